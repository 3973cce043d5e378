"""The page of `pixelcnn serve` in a real browser: each of its parts, held against the program itself.

    page.py PROGRAM [--pictures FOLDER]

PROGRAM is the built `pixelcnn`; a Chromium must be there. Needs Playwright, NumPy and Pillow. With
--pictures a picture of each part is kept.
"""

import argparse
import base64
import contextlib
import io
import json
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request

import numpy as np
from PIL import Image
from playwright.sync_api import Error as PlaywrightError
from playwright.sync_api import expect, sync_playwright

HERE = pathlib.Path(__file__).resolve().parent
SAMPLE = HERE.parent.parent / "pixelcnn" / "tests" / "data" / "cifar10-sample.npz"


@contextlib.contextmanager
def serving(program, folder, *flags):
    """The server's link, while it runs; it must end cleanly."""
    command = [program, "serve", "--port", "0", *flags]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        try:
            yield server.stdout.readline().strip()
        finally:
            server.terminate()
            _, said = server.communicate(timeout=20)
    assert server.returncode == 0, said
    assert "panic" not in said, said


def run(program, folder, *flags):
    """What the program prints."""
    done = subprocess.run([program, *flags], cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout


def pixels_of(canvas):
    """A canvas's levels, [H, W, 3]."""
    url = canvas.evaluate("canvas => canvas.toDataURL('image/png')")
    file = base64.b64decode(url.split(",")[1])
    return np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))


def singles(folder):
    """The pictures that the program wrote, in their order."""
    return [np.asarray(Image.open(path).convert("RGB")) for path in sorted(folder.glob("*.png"))]


class Page:
    def __init__(self, page, program, folder, pictures):
        self.page, self.program, self.folder, self.pictures = page, program, folder, pictures

    def part(self, name):
        self.page.get_by_role("tab", name=name).click()
        return self.page.get_by_role("tabpanel", name=name)

    def keep(self, name):
        if self.pictures:
            self.page.screenshot(path=self.pictures / f"{name}.png", full_page=True)

    def draws(self):
        part = self.part("Draw")
        part.get_by_label("Pictures").fill("20")
        part.get_by_label("Seed").fill("3")
        began = time.monotonic()
        part.get_by_role("button", name="Draw", exact=True).click()
        # They appear row by row.
        expect(part.locator(".pictures canvas").first).to_be_visible()
        expect(part.get_by_role("status")).to_contain_text("20 pictures in", timeout=60_000)
        print(f"drawn in {time.monotonic() - began:.1f} s: {part.get_by_role('status').inner_text()}")
        drawn = part.locator(".pictures").first.locator("canvas")
        run(self.program, self.folder, "sample", "--num", "20", "--seed", "3", "--singles", "drawn")
        expected = singles(self.folder / "drawn")
        assert len(expected) == drawn.count() == 20
        for i, image in enumerate(expected):
            assert (pixels_of(drawn.nth(i)) == image).all(), f"picture {i}"

        # One of them, closely: the pixel under the pointer, and the bits of each.
        part.get_by_role("button", name="Picture 2: look closer").click()
        view = part.get_by_role("img", name="The picture, enlarged")
        box = view.bounding_box()
        view.hover(position={"x": box["width"] * 10.5 / 32, "y": box["height"] * 20.5 / 32})
        expect(part.locator(".where")).to_contain_text("Row 20, column 10")
        expect(part.locator(".chart polyline")).to_have_count(3)
        said = part.locator(".likely").inner_text()
        levels = [int(level) for level in re.findall(r"(\d+):", said)]
        assert levels == list(expected[1][20, 10]), said
        bits = float(re.search(r"there: ([\d.]+)", said)[1])
        score = self.asked("v1/score", {"images": [{"levels": expected[1].tolist()}], "maps": True})
        mapped = score["scores"][0]["bits_per_pixel"][20][10]
        assert abs(bits - mapped) < 0.02, (bits, mapped)
        # By keys, too.
        view.focus()
        self.page.keyboard.press("ArrowDown")
        expect(part.locator(".where")).to_contain_text("Row 21, column 10")
        part.get_by_label("bits per pixel").check()
        expect(part.locator(".scale .top")).to_contain_text("bits")
        assert len(np.unique(pixels_of(view).reshape(-1, 3), axis=0)) > 50
        self.keep("draw")
        part.get_by_role("button", name="Go on from here").click()
        expect(part.get_by_role("status")).to_contain_text("5 pictures in", timeout=60_000)
        variants = part.locator(".variants canvas")
        for i in range(5):
            variant = pixels_of(variants.nth(i))
            assert (variant[:21] == expected[1][:21]).all() and (variant[21, :10] == expected[1][21, :10]).all()
            assert (variant[21:] != expected[1][21:]).any()

    def completes(self):
        image = self.image
        part = self.part("Complete")
        part.locator("input[type=file]").set_input_files(self.folder / "image.png")
        part.get_by_label("The first missing row").fill("20")
        part.get_by_label("Ways").fill("3")
        part.get_by_label("Seed").fill("7")
        part.get_by_role("button", name="Complete", exact=True).click()
        expect(part.get_by_role("status")).to_contain_text("3 pictures in", timeout=60_000)
        flags = ["--keep", "top:20", "--variants", "3", "--seed", "7", "--singles", "completed"]
        run(self.program, self.folder, "complete", "image.png", *flags)
        expected = singles(self.folder / "completed")
        shown = part.locator("div.pictures canvas")
        for i, variant in enumerate(expected):
            assert (pixels_of(shown.nth(i)) == variant).all(), f"variant {i}"

        # A hole that is painted.
        part.get_by_label("what I paint over").check()
        canvas = part.get_by_role("img", name="The picture with what is missing")
        box = canvas.bounding_box()
        middle = (box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        self.page.mouse.move(*middle)
        self.page.mouse.down()
        self.page.mouse.move(middle[0] + box["width"] / 8, middle[1])
        self.page.mouse.up()
        gone = (pixels_of(canvas) != image).any(axis=2)
        assert 10 < gone.sum() < 200, gone.sum()
        part.get_by_role("button", name="Complete", exact=True).click()
        expect(part.get_by_role("status")).to_contain_text("3 pictures in", timeout=60_000)
        self.keep("complete")
        for i in range(3):
            changed = (pixels_of(shown.nth(i)) != image).any(axis=2)
            assert changed.any() and not (changed & ~gone).any()

    def scores(self):
        part = self.part("Score")
        part.locator("input[type=file]").set_input_files([self.folder / "image.png", self.folder / "odd.png"])
        expect(part.get_by_role("status")).to_contain_text("2 measured", timeout=60_000)
        run(self.program, self.folder, "score", "pictures", "-o", "scores")
        lines = (self.folder / "scores" / "scores.csv").read_text().splitlines()
        rows = [dict(zip(lines[0].split(","), line.split(","))) for line in lines[1:]]
        table = part.get_by_role("row")
        assert table.count() == 3
        for row, expected in zip(("image.png", "odd.png"), sorted(rows, key=lambda row: row["name"])):
            cells = part.get_by_role("row").filter(has_text=row).get_by_role("cell").all_inner_texts()
            columns = ["bits_per_dim", "png_bits_per_dim", "jpeg_xl_bits_per_dim", "corrected"]
            for shown, column in zip(cells[2:], columns):
                assert abs(float(shown) - float(expected[column])) < 1e-3, (row, column, shown, expected)
        expect(part.locator(".histograms svg")).to_have_count(2)
        self.keep("score")

    def compresses(self):
        part = self.part("Compress")
        files = [self.folder / name for name in ("image.png", "odd.png", "note.txt")]
        part.locator("input[type=file]").set_input_files(files)
        expect(part.get_by_role("status")).to_contain_text("Done", timeout=60_000)
        self.keep("compress")
        with self.page.expect_download() as download:
            part.get_by_role("link", name="archive.pxc").click()
        archive = self.folder / "archive.pxc"
        download.value.save_as(archive)
        run(self.program, self.folder, "decompress", "archive.pxc", "-o", "out")
        for file in files:
            back = self.folder / "out" / file.name
            if file.suffix == ".png":
                assert (np.asarray(Image.open(back)) == np.asarray(Image.open(file))).all()
            else:
                assert back.read_bytes() == file.read_bytes()
        # The program's archive is the same.
        run(self.program, self.folder, "compress", *[file.name for file in files], "-o", "own.pxc")
        assert archive.read_bytes() == (self.folder / "own.pxc").read_bytes()
        part.locator("input[type=file]").set_input_files(archive)
        expect(part.get_by_role("status")).to_contain_text("3 of 3 taken out", timeout=60_000)
        with self.page.expect_download() as download:
            part.get_by_role("link", name="note.txt").click()
        assert pathlib.Path(download.value.path()).read_bytes() == files[2].read_bytes()
        # A damaged one is said to be.
        broken = bytearray(archive.read_bytes())
        broken[len(broken) // 2] ^= 1
        (self.folder / "broken.pxc").write_bytes(broken)
        part.locator("input[type=file]").set_input_files(self.folder / "broken.pxc")
        expect(part.get_by_role("status")).to_contain_text(re.compile("of 3 taken out|damaged|altered"), timeout=60_000)

    def trains(self):
        part = self.part("Training")
        expect(part.get_by_role("status")).to_contain_text("There is no run yet", timeout=10_000)
        small = ["--nr-filters", "4", "--nr-resnet", "1", "--batch-size", "4", "--init-batch-size", "8"]
        small += ["--samples", "4", "--save-interval", "1", "--eval-interval", "1"]
        data = ["--data", str(SAMPLE)]
        run(self.program, self.folder, "train", "runs/one", *small, *data, "--epochs", "1", "--learning-rate", "0.001")
        # It is found while the page is open.
        expect(part.get_by_role("checkbox", name="one")).to_be_checked(timeout=10_000)
        run(self.program, self.folder, "train", "runs/two", *small, *data, "--epochs", "2", "--learning-rate", "0.002")
        part.get_by_role("checkbox", name="two").check(timeout=10_000)
        row = part.get_by_role("row").filter(has=self.page.get_by_role("checkbox", name="two"))
        records = (self.folder / "runs" / "two" / "metrics.jsonl").read_text().splitlines()
        tests = [json.loads(line) for line in records if "test_bits_per_dim" in line]
        expect(row).to_contain_text(f"{tests[-1]['test_bits_per_dim']:.4f}", timeout=10_000)
        expect(part.locator(".chart polyline").first).to_be_visible()
        expect(part.locator(".samples img")).to_be_visible()
        part.get_by_text("Settings side by side").click()
        expect(part.get_by_role("row", name="train.learning_rate 0.001 0.002")).to_be_visible()
        self.keep("training")
        # What was trained draws.
        chosen = self.page.locator("#model")
        expect(self.page.locator("#model option")).to_have_count(3, timeout=10_000)
        chosen.select_option("two")
        part = self.part("Draw")
        part.get_by_label("Pictures").fill("2")
        part.get_by_role("button", name="Draw", exact=True).click()
        expect(part.get_by_role("status")).to_contain_text("2 pictures in", timeout=60_000)
        chosen.select_option("shipped:cifar10")

    def stops(self):
        part = self.part("Draw")
        part.get_by_label("Pictures").fill("64")
        for _ in range(5):
            part.get_by_role("button", name="Draw", exact=True).click()
            expect(part.get_by_role("status")).to_contain_text("row", timeout=60_000)
            # A fast machine may be done before.
            with contextlib.suppress(PlaywrightError):
                part.get_by_role("button", name="Stop").click(timeout=2_000)
            if part.get_by_role("status").inner_text() == "Stopped.":
                break
        expect(part.get_by_role("status")).to_contain_text("Stopped")
        deadline = time.monotonic() + 20
        while "pixelcnn_requests_running 0" not in self.text("metrics"):
            assert time.monotonic() < deadline, "nobody waits, and it is still drawn"
            time.sleep(0.1)

    def text(self, path):
        with urllib.request.urlopen(self.link + path) as answer:
            return answer.read().decode()

    def asked(self, path, request):
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.link + path, json.dumps(request).encode(), headers)
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", type=pathlib.Path)
    parser.add_argument("--pictures", type=pathlib.Path)
    arguments = parser.parse_args()
    program = arguments.program.resolve()
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    assert chromium, "there is no Chromium: install one"
    with tempfile.TemporaryDirectory() as name, sync_playwright() as playwright:
        folder = pathlib.Path(name)
        image = np.load(SAMPLE)["testx"][1]
        Image.fromarray(image).save(folder / "image.png")
        Image.fromarray(np.tile(image, (2, 2, 1))[:47, :33]).save(folder / "odd.png")
        (folder / "note.txt").write_text("kept as it is\n")
        (folder / "pictures").mkdir()
        for file in ("image.png", "odd.png"):
            shutil.copy(folder / file, folder / "pictures")
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        with serving(program, folder) as link:
            tab = browser.new_page(accept_downloads=True)
            errors = []
            tab.on("pageerror", lambda error: errors.append(str(error)))
            tab.on("console", lambda said: said.type == "error" and errors.append(said.text))
            tab.goto(link)
            page = Page(tab, program, folder, arguments.pictures)
            page.link, page.image = link, image
            for part in (page.draws, page.completes, page.scores, page.compresses, page.trains, page.stops):
                part()
                print(part.__name__, flush=True)
            if arguments.pictures:
                for width, scheme in ((390, "light"), (1200, "dark")):
                    tab.emulate_media(color_scheme=scheme)
                    tab.set_viewport_size({"width": width, "height": 800})
                    page.part("Score")
                    page.keep(f"score-{width}-{scheme}")
            assert not errors, errors
        # Others need the link with the token.
        with serving(program, folder, "--address", "0.0.0.0") as link:
            assert "token=" in link
            tab = browser.new_page()
            assert tab.goto(link.split("?")[0]).status == 401
            assert tab.goto(link).status == 200
            assert "token" not in tab.url
            expect(tab.locator("#card")).to_contain_text("cifar10")
        browser.close()
    print("the page does what the program does")


if __name__ == "__main__":
    sys.exit(main())
