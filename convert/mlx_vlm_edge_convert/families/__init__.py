"""One file per family: its published layouts -> the native one."""
