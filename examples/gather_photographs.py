"""Gather the 151 photographs that the universal network was trained on, from five packages of Debian 12 (bookworm).

python examples/gather_photographs.py DIR

It needs Pillow, and apt-get and dpkg-deb, which every Debian has, but no root. It downloads 212 MB into a temporary
folder, installs nothing, and writes the photographs, their licences, and README.md, which says where each is from. The
photographs are shrunk, which also takes most traces of their compression away.
"""

import io
import struct
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

# Version and licences of each package. apt-get checks Debian's signatures, so the same version has the same files.
PACKAGES = {
    "gcompris-qt-data": (
        "3.1-2",
        "public domain (50), CC0 1.0 (31), CC BY-SA 4.0 (27), CC BY 2.0 (5), CC BY 3.0 (2)",
    ),
    "lomiri-wallpapers-16.04": ("20.04.0-2", "CC BY 4.0 (8), CC BY-SA 4.0 (4), CC0 1.0 (1)"),
    "lomiri-wallpapers-20.04": ("20.04.0-2", "CC BY-SA 3.0"),
    "mate-backgrounds": ("1.26.0-1", "GPL 2 or later"),
    "plasma-workspace-wallpapers": (
        "4:5.27.5-2",
        "GPL 2 or later by Debian's file, LGPL 3 by the wallpapers' own",
    ),
}

# The photographs among the wallpapers. The others are drawn, rendered or heavily edited; DarkestHour is one dark blue.
WALLPAPERS = {
    "lomiri-wallpapers-16.04": (
        "usr/share/backgrounds/{}.jpg",
        "aitzgorri_by_Aitzol_Berasategi Bridge_by_Sander_Klootwijk Dragonfly_by_Bolly free_by_Peter_Nerlich "
        "friends_by_Aitzol_Berasategi greentock_by_Peter_Nerlich life_by_Aitzol_Berasategi "
        "picosdeeuropa_by_Aitzol_Berasategi Picture_0B_by_freespace Picture_1A_by_freespace "
        "seeding_by_Clements_Engelhardt sunset_by_Aitzol_Berasategi Wine_by_Jakkub_Mede",
    ),
    "lomiri-wallpapers-20.04": ("usr/share/backgrounds/{}.jpg", "Kleiber_by_Lukas_Baubkus"),
    "mate-backgrounds": (
        "usr/share/backgrounds/mate/nature/{}.jpg",
        "Aqua Blinds Dune FreshFlower Garden GreenMeadow LadyBird RainDrops Storm TwoWings Wood YellowFlower",
    ),
    "plasma-workspace-wallpapers": (
        "usr/share/wallpapers/{}/contents/images/2560x1600.jpg",
        "BytheWater ColdRipple ColorfulCups EveningGlow FallenLeaf Grey Kite OneStandsOut Path summer_1am",
    ),
}

# Resource files of gcompris in which every WebP image is a photograph; its drawings there are SVG.
RESOURCES = {
    "erase": "erase",
    "farm_animals": "explore_farm_animals",
    "monuments": "explore_monuments",
    "world_animals": "explore_world_animals",
    "world_music": "explore_world_music",
}


def resource_files(resource: bytes) -> list[tuple[str, bytes]]:
    """The files in one of Qt's binary resource files (.rcc), in the order of their data: path and content.

    The file has a header, a tree of directories and files, their names, and the data, each with its length before it.
    """
    if resource[:4] != b"qres":
        raise ValueError(f"the file begins with {resource[:4]!r}; a resource file of Qt begins with b'qres'")
    version, tree, data, names = struct.unpack_from(">4I", resource, 4)
    node_size = 14 if version == 1 else 22  # later versions add the time of change

    def walk(node: int, path: str) -> Iterator[tuple[int, str, bytes]]:
        name, flags, first, second = struct.unpack_from(">IHII", resource, tree + node * node_size)
        if node:  # the root has no name
            (length,) = struct.unpack_from(">H", resource, names + name)
            start = names + name + 6  # after the length and a hash
            path += "/" + resource[start : start + 2 * length].decode("utf-16-be")
        if flags & 2:  # a directory: the number of its entries, and the first one
            for child in range(second, second + first):
                yield from walk(child, path)
            return
        (length,) = struct.unpack_from(">I", resource, data + second)
        content = resource[data + second + 4 : data + second + 4 + length]
        if len(content) < length or flags & 4:
            raise ValueError(
                f"{path} is {'compressed by Zstandard' if flags & 4 else 'cut short'}; it takes whole, plain files"
            )
        yield second, path, zlib.decompress(content[4:]) if flags & 1 else content

    return [(path, content) for _, path, content in sorted(walk(0, ""))]


def write_photograph(image: Image.Image, scale: float, file: Path) -> None:
    """Write `image` as a JPEG with colours at full resolution, shrunk by `scale`."""
    size = round(image.width * scale), round(image.height * scale)
    image = image.convert("RGB")
    if scale < 1:
        image = image.resize(size, Image.Resampling.LANCZOS)  # in Pillow it filters before it subsamples
    image.save(file, quality=95, subsampling="4:4:4")


def download(folder: Path) -> None:
    """Unpack each package into the folder of its name."""
    for name, (version, _) in PACKAGES.items():
        print(f"downloading {name} {version}", flush=True)
        try:
            subprocess.run(
                ["apt-get", "download", f"{name}={version}"], cwd=folder, check=True, capture_output=True, text=True
            )
            (package,) = folder.glob(f"{name}_*.deb")
            subprocess.run(["dpkg-deb", "-x", package, folder / name], check=True, capture_output=True, text=True)
        except FileNotFoundError as error:
            sys.exit(f"{error.filename} is missing; this takes Debian 12 (bookworm), such as the container debian:12")
        except subprocess.CalledProcessError as error:
            sys.exit(
                f"{name} {version} could not be downloaded and unpacked; this takes Debian 12 (bookworm), a network, "
                f"and present package lists (apt-get update):\n{error.stderr.strip()}"
            )
        package.unlink()


def write_all(packages: Path, out: Path) -> int:
    """Write the photographs in the unpacked packages, README.md and licences/ to `out`; return how many there are."""
    licences, origins = out / "licences", {}
    licences.mkdir()
    for label, resource in RESOURCES.items():
        file = packages / f"gcompris-qt-data/usr/share/gcompris-qt/rcc/{resource}.rcc"
        contents = resource_files(file.read_bytes())
        for path, content in contents:
            if path.endswith("/README"):
                (licences / f"gcompris-{label}.README").write_bytes(content)
        photographs = [(path, content) for path, content in contents if path.endswith(".webp")]
        for number, (path, content) in enumerate(photographs, 1):
            name = f"gcompris-{label}-{number:03}.jpg"
            with Image.open(io.BytesIO(content)) as image:
                write_photograph(image, 0.6 if max(image.size) > 1500 else 0.75, out / name)
            origins[name] = f"gcompris-qt-data, {file.name}: {path}"
    for package, (path, names) in WALLPAPERS.items():
        for wallpaper in names.split():
            name, file = f"{package}-{wallpaper.lower()}.jpg", packages / package / path.format(wallpaper)
            with Image.open(file) as image:
                write_photograph(image, 1600 / max(image.size) if max(image.size) > 2000 else 1, out / name)
            origins[name] = f"{package}, /{file.relative_to(packages / package)}"
            metadata = file.parents[2] / "metadata.json"  # only plasma's wallpapers have one
            if metadata.exists():
                (licences / f"{package}-{wallpaper.lower()}.json").write_bytes(metadata.read_bytes())
    for package in PACKAGES:
        text = (packages / package / f"usr/share/doc/{package}/copyright").read_bytes()
        (licences / f"{package}.copyright").write_bytes(text)
    (out / "README.md").write_text(readme(origins), encoding="utf-8")
    return len(origins)


def readme(origins: dict[str, str]) -> str:
    """The text that says where each photograph comes from, and under which licences."""
    lines = [
        f"# {len(origins)} photographs from Debian 12",
        "",
        "Shrunk and written as JPEG (quality 95, 4:4:4) by jfbfast's examples/gather_photographs.py. licences/ has the",
        "packages' copyright files. The authors and licences of gcompris's photographs are in *.README, and those of",
        "plasma's in *.json.",
        "",
        "| package | version | photographs | licences |",
        "| --- | --- | --- | --- |",
    ]
    for name, (version, licence) in PACKAGES.items():
        count = sum(origin.startswith(f"{name}, ") for origin in origins.values())
        lines.append(f"| {name} | {version} | {count} | {licence} |")
    lines += ["", "| photograph | package and file |", "| --- | --- |"]
    lines += [f"| {name} | {origin} |" for name, origin in sorted(origins.items())]
    return "\n".join(lines) + "\n"


def main(arguments: list[str]) -> None:
    if len(arguments) != 1 or arguments[0].startswith("-"):
        sys.exit(__doc__)
    out = Path(arguments[0])
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        sys.exit(f"DIR is {out}, which has files in it; it takes a new or an empty folder")
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        download(Path(temporary))
        print(f"{write_all(Path(temporary), out)} photographs in {out}")


if __name__ == "__main__":
    main(sys.argv[1:])
