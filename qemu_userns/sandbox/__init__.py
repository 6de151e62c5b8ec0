"""What happens between fork and execve: namespaces, view, confinement."""
