"""The test host: a Debian system under software emulation, with devices that the machine below may lack."""
