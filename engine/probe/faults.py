"""What NVML's errors mean for a person: one sentence, its reason and its remedy each."""

from __future__ import annotations

import sys
from pathlib import Path

from engine.values import Fault

NO_GPU = "no NVIDIA card was found"
NO_DRIVER = "no NVIDIA driver was found"

_PCI = Path("/sys/bus/pci/devices")
# /dev/dxg is no sign: WSL has it without any NVIDIA card too.
_DEVICE_FILES = ("/dev/nvidiactl",)
_NVIDIA_VENDOR = "0x10de"
_DISPLAY_CLASSES = ("0x0300", "0x0302")
_WITHOUT = "`--device cpu` runs without the card"

# By NVML's error code. {card} is "card 1" or "the NVIDIA driver".
_Told = tuple[str, str, str]
_WENT_AWAY: _Told = (
    "{card} went away while the cards were being read",
    "the driver's list of cards changed",
    "run again",
)
_BY_CODE: dict[int, _Told] = {
    2: _WENT_AWAY,
    6: _WENT_AWAY,
    4: (
        "{card} may not be used by this user",
        "permission denied",
        "ask who runs the machine for access to /dev/nvidia*",
    ),
    8: ("{card} has no power", "an external power cable is not attached", "attach it"),
    9: (
        "the NVIDIA driver is installed and not loaded",
        "its kernel module does not run",
        "reboot, or run `sudo modprobe nvidia`",
    ),
    10: ("{card} does not answer", "the driver timed out", "reboot; if it comes back, the card or its slot is failing"),
    11: ("{card} has an interrupt problem", "the kernel reports it", "reboot; look at `sudo dmesg | grep -i nvrm`"),
    13: (
        "the NVIDIA driver is too old",
        "it lacks what every driver since 2016 has",
        "install a newer driver",
    ),
    14: (
        "{card}'s information is corrupted",
        "its firmware store cannot be read",
        "reboot; if it comes back, the card is failing",
    ),
    15: (
        "{card} is lost",
        "it fell off the bus, or another program reset it",
        "reboot; if it comes back, the card or its power is failing",
    ),
    16: ("{card} needs a reset", "it cannot be used until then", "run `sudo nvidia-smi --gpu-reset`, or reboot"),
    17: (
        "the operating system blocks {card}",
        "a control group or a sandbox does",
        "start the container with access to the card (--gpus all)",
    ),
    18: (
        "the NVIDIA driver and its library are of different versions",
        "the driver was updated and the old one is still loaded",
        "reboot",
    ),
    20: ("{card} has no memory left for a query", "the driver says so", "close what else uses the card"),
}
_OTHER = "{card} does not answer as it should"


def of_code(code: int, message: str, index: int | None = None) -> Fault:
    """Return the fault for an NVML error: of one card, or of the driver."""
    card = "the NVIDIA driver" if index is None else f"card {index}"
    what, why, do = _BY_CODE.get(
        code, ("{card} does not answer as it should", f"NVML says: {message}", "run nvidia-smi to see more")
    )
    return Fault(index=index, what=what.format(card=card), why=why, do=f"{do}; {_WITHOUT}")


def without_library() -> Fault | None:
    """Return the fault when there is a card and the driver's library is not there; None when there is no card."""
    files = [f for f in _DEVICE_FILES if Path(f).exists()]
    if files:
        return Fault(
            index=None,
            what="there is an NVIDIA card here, and the driver's library (libnvidia-ml.so.1) is not",
            why=f"{files[0]} is there: this looks like a container that was given the card without the driver's files",
            do=f"start it with the NVIDIA container toolkit (docker run --gpus all …); {_WITHOUT}",
        )
    return card_without_driver()


def card_without_driver() -> Fault | None:
    """Return the fault when the bus has an NVIDIA card for which no driver is loaded; None when it has none."""
    if sys.platform != "linux" or not _card_on_bus():
        return None
    return Fault(
        index=None,
        what="there is an NVIDIA card on the bus, and no driver for it is loaded",
        why="the driver is not installed, or its kernel module does not run",
        do=f"install NVIDIA's driver and reboot (a container: start it with --gpus all); {_WITHOUT}",
    )


def _card_on_bus() -> bool:
    try:
        devices = list(_PCI.iterdir())
    except OSError:
        return False
    return any(_is_card(device) for device in devices)


def _is_card(device: Path) -> bool:
    try:
        vendor = (device / "vendor").read_text(encoding="ascii", errors="replace").strip()
        kind = (device / "class").read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return False
    return vendor == _NVIDIA_VENDOR and kind.startswith(_DISPLAY_CLASSES)
