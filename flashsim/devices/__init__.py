"""GPUs as cited data: one TOML file each, in which every number has a value, a status and a source."""

from flashsim.devices.load import device_names, load_device
from flashsim.devices.spec import Citation, DeviceSpec

__all__ = ["Citation", "DeviceSpec", "device_names", "load_device"]
