"""One table: bits/dim and speed of lossless codecs on the same images. Started by ./run, which see."""

import argparse
import csv
import resource
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import imagecodecs
import numpy as np
import oxipng

from images import cifar10


def oxipng_encode(image):
    """PNG with all filters tried, and libdeflate's best. Zopfli gains another 0.8 % in 75 times the
    time."""
    return oxipng.optimize_from_memory(
        imagecodecs.png_encode(image, level=9),
        level=6,
        strip=oxipng.StripChunks.all(),
        deflate=oxipng.Deflaters.libdeflater(12),
    )


def jpeg_xl(effort):
    return (
        lambda image: imagecodecs.jpegxl_encode(image, lossless=True, effort=effort, numthreads=1),
        lambda file: imagecodecs.jpegxl_decode(file, numthreads=1),
    )


# Each encodes an image u8 [H, W, 3] to bytes, on one thread, and decodes them.
CODECS = {
    "PNG (zlib 9)": (
        lambda image: imagecodecs.png_encode(image, level=9),
        imagecodecs.png_decode,
    ),
    "PNG (oxipng 6)": (oxipng_encode, imagecodecs.png_decode),
    "QOI": (imagecodecs.qoi_encode, imagecodecs.qoi_decode),
    "WebP lossless (method 6)": (
        lambda image: imagecodecs.webp_encode(image, level=100, lossless=True, method=6, numthreads=1),
        imagecodecs.webp_decode,
    ),
    "JPEG XL lossless (effort 7)": jpeg_xl(7),
    "JPEG XL lossless (effort 9)": jpeg_xl(9),
}


def measure(codec, images):
    """Bits/dim, and MB of levels a second of processor time each way; the images must come back as
    they were."""
    encode, decode = CODECS[codec]
    start = time.process_time()
    files = [encode(image) for image in images]
    encoded = time.process_time()
    decoded = [decode(file) for file in files]
    end = time.process_time()
    for image, back in zip(images, decoded):
        # Grey ones come back with one channel from codecs that notice.
        back = np.broadcast_to(np.atleast_3d(back), image.shape)
        assert np.array_equal(image, back), f"{codec} is not lossless"
    size = sum(image.size for image in images)
    bits = 8 * sum(map(len, files)) / size
    return bits, size / 1e6 / (encoded - start), size / 1e6 / (end - encoded)


def tiled(images):
    """All images as one picture, as many side by side as makes it roughly square."""
    n, h, w, c = images.shape
    columns = max(k for k in range(1, int(1.3 * n**0.5) + 1) if n % k == 0)
    rows = images.reshape(n // columns, columns, h, w, c).transpose(0, 2, 1, 3, 4)
    return np.ascontiguousarray(rows.reshape(n // columns * h, columns * w, c))


def write_pngs(folder, images):
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for i, image in enumerate(images):
        (folder / f"{i:05}.png").write_bytes(imagecodecs.png_encode(image, level=9))


def processor_time():
    return sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])


def ours(program, run, folder, images, threads, spent):
    """As `measure`, through files and with the program's start; `spent` is the clock."""
    file, back = folder / "images.pxc", folder / "back"
    shutil.rmtree(back, ignore_errors=True)
    file.unlink(missing_ok=True)
    seconds = []
    for command in [
        ["compress", *run, folder / "images", "-o", file],
        ["decompress", *run, file, "-o", back],
    ]:
        start = spent()
        command = [program, *command, *threads]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        seconds.append(spent() - start)
    decoded = [imagecodecs.png_decode(path.read_bytes()) for path in sorted(back.rglob("*.png"))]
    assert len(decoded) == len(images), f"{len(decoded)} images came back"
    assert all(np.array_equal(a, b) for a, b in zip(images, decoded)), "other images came back"
    size = sum(image.size for image in images)
    return 8 * file.stat().st_size / size, *(size / 1e6 / time for time in seconds)


def likelihood(program, run, folder):
    """Mean bits/dim under the model."""
    with tempfile.TemporaryDirectory() as scores:
        command = [program, "score", *run, folder / "images", "-o", scores]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        with open(Path(scores, "scores.csv"), newline="") as table:
            return np.mean([float(row["bits_per_dim"]) for row in csv.DictReader(table)])


def pictures(options, chosen, folder):
    """The table of pictures of any size: ours on all threads and by the clock on the wall."""
    paths = sorted(options.pictures.rglob("*.png"))
    images = [imagecodecs.png_decode(path.read_bytes()) for path in paths]
    write_pngs(folder / "images", images)
    print(f"{len(images)} pictures of {options.pictures.name}, {sum(image.size for image in images):,} levels")
    print("| codec | bits/dim | MB/s in | MB/s out |")
    print("|---|--:|--:|--:|", flush=True)
    if chosen("ours"):
        found = ours(options.program, options.run, folder, images, [], time.perf_counter)
        bits, encode, decode = found
        print(f"| **ours** | {bits:.4f} | {encode:.3f} | {decode:.3f} |", flush=True)
    for codec in filter(chosen, CODECS):
        bits, encode, decode = measure(codec, images)
        print(f"| {codec} | {bits:.4f} | {encode:.3f} | {decode:.3f} |", flush=True)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("program")
    parser.add_argument("run", nargs="*", help="run folder or checkpoint file [the shipped model]")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--pictures", type=Path, help="folder of PNG files to measure instead")
    parser.add_argument("--codecs", default="", help="only those whose names have one of these, a|b")
    options = parser.parse_args()
    wanted = [part.lower() for part in options.codecs.split("|")]
    chosen = lambda name: any(part in name.lower() for part in wanted)

    folder = Path(__file__).parent / "work"
    if options.pictures:
        return pictures(options, chosen, folder)
    images = cifar10(options.images)
    write_pngs(folder / "images", images)

    print(f"{len(images)} CIFAR-10 test images, one picture is {tiled(images).shape}")
    print("| codec | bits/dim, a file each | MB/s in | MB/s out | bits/dim, one picture of all |")
    print("|---|--:|--:|--:|--:|")
    if chosen("ours"):
        one = ["--threads", "1"]
        found = ours(options.program, options.run, folder, images, one, processor_time)
        bits, encode, decode = found
        print(f"| **ours** (one file of all) | | {encode:.3f} | {decode:.3f} | {bits:.4f} |")
    if chosen("likelihood"):
        bits = likelihood(options.program, options.run, folder)
        print(f"| the model's likelihood | {bits:.4f} | | | |", flush=True)
    for codec in filter(chosen, CODECS):
        bits, encode, decode = measure(codec, images)
        together, *_ = measure(codec, [tiled(images)])
        print(f"| {codec} | {bits:.4f} | {encode:.3f} | {decode:.3f} | {together:.4f} |", flush=True)


if __name__ == "__main__":
    main()
