"""An arm64 device that is emulated whole: Debian with systemd and ssh under qemu-system-aarch64, as root on Linux."""
