"""The gallery of a folder: what is found, what is on the page, and what is never written."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from urllib.parse import unquote

import pytest
from comparison_fixture import image_comparison, sft_comparison
from galleries import fill, run, write
from page import EVIL, Page
from typer.testing import CliRunner

from peft_recipes import RecipeError
from peft_recipes.cards.redaction import portable
from peft_recipes.cli.app import app
from peft_recipes.gallery import write as written
from peft_recipes.gallery.collect import collect
from peft_recipes.gallery.entries import entries
from peft_recipes.gallery.points import point
from peft_recipes.gallery.write import write_gallery

ROOT = Path(__file__).parents[2]
LINK = re.compile(r'(?:href|src)="([^"#]+)"')


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder and its gallery: (folder, output, result)."""
    root = fill(tmp_path_factory.mktemp("runs"))
    output = root / "site"  # inside the folder: a second call must not read what the first has written
    return root, output, write_gallery(root, output)


@pytest.fixture(scope="module")
def index(made):
    return (made[1] / "index.html").read_text("utf-8")


def test_comparisons_runs_and_adapters_are_found_at_any_depth(made):
    result = made[2]
    assert (result.comparisons, result.others) == (2, 2)
    titles = [entry.title for entry in entries(collect(made[0], made[1]))]
    assert titles[0].startswith("Digits") and titles[1].startswith("Answers") and titles[2:] == ["alone", "adapter"]


def test_what_is_broken_or_unfinished_is_named_with_its_reason_and_without_the_path_of_the_machine(made, index):
    root, _, result = made
    left_out = dict(result.left_out)
    assert set(left_out) == {
        "broken/a/comparison.json", "broken/b/comparison.json", "broken/c/comparison.json", "broken/d/comparison.json",
        "broken/lora/seed-0/run.json", "broken/lora/seed-1", "broken/adapter/adapter_config.json",
    }  # fmt: skip
    assert "unfinished" in left_out["broken/lora/seed-1"] and "schema 9" in left_out["broken/b/comparison.json"]
    shown = Page(index).text
    assert all(path in shown for path in left_out)
    assert str(root) not in index and not any(str(root) in reason for reason in left_out.values())


def test_every_link_leads_to_a_file_of_the_gallery_and_nothing_else_is_there(made):
    output = made[1]
    for page in output.rglob("*.html"):
        for link in LINK.findall(page.read_text("utf-8")):
            if not link.startswith(("data:", "https://example.com")):
                target = (page.parent / unquote(link)).resolve()
                assert target.is_relative_to(output.resolve()) and target.is_file(), f"{page}: {link}"
    files = {path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file()}
    assert files == set(json.loads((output / "gallery.json").read_text())["files"]) | {"gallery.json"}
    assert {Path(name).suffix for name in files} == {".html", ".css", ".js", ".json", ".png"}


def test_nothing_is_loaded_from_elsewhere_and_no_path_of_the_machine_is_on_a_page(made):
    for path in made[1].rglob("*"):
        if path.suffix in (".html", ".css", ".js"):
            text = path.read_text("utf-8")
            assert not re.search(
                r'(?:src|href)="(?:https?:)?//(?!example\.com)|url\((?!#)|@import|/home/someone', text
            ), path
            assert 'src="http' not in text and str(Path.home()) + "/" not in text


def test_untrusted_markup_is_text(made, index):
    assert "<script>alert" not in index and EVIL.splitlines()[0] in Page(index).text
    card = next(made[1].glob("pages/*/LoRA*-0.html")).read_text("utf-8")
    page = Page(card)
    assert "<script>alert" not in card and "onerror" not in str(page.tags) and "javascript:" not in str(page.tags)
    assert page.all("details") and page.all("table") and "base_model" not in page.text  # front matter is not text
    assert [image["alt"] for image in page.all("img")] == ["A plot"]
    assert [link["href"] for link in page.all("a") if "example" in link["href"]] == ["https://example.com"]


def test_the_pages_are_well_formed_and_name_their_parts(index):
    page = Page(index)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids)) and all("for" in output or "id" in output for output in page.all("output"))
    for tag in ("select", "input"):
        assert all(attributes["id"] for attributes in page.all(tag))
    assert index.count("<label") == len(page.all("select")) + len(page.all("input"))
    assert all(svg.get("aria-hidden") == "true" for svg in page.all("svg"))


def test_an_arm_has_its_verdict_figures_and_the_cards_of_its_seeds(made, index):
    row = re.search(r"<tr[^>]*>(?:(?!</tr>).)*LoRA r=8</span>.*?</tr>", index, re.DOTALL)[0]
    assert "▼" in row and "worse" in row and "27,216" in row and "80.2" in row
    assert [link["href"] for link in Page(row).all("a")] == [
        "pages/images-mnist-shift/LoRA-r-8-0.html", "pages/images-mnist-shift/LoRA-r-8-1.html",
    ]  # fmt: skip
    assert 'href="pages/images-mnist-shift/report.html"' in index
    report = (made[1] / "pages/images-mnist-shift/report.html").read_text("utf-8")
    assert 'href="../../index.html"' in report and "All arms, side by side" in report


def test_runs_outside_of_comparisons_are_means_over_seeds_without_a_verdict(made):
    alone = next(entry for entry in entries(collect(made[0], made[1])) if entry.title == "alone")
    (line,) = alone.lines
    assert line.cells["metric"].text == "80.5 %" and line.cells["metric"].sub == "± 0.7"
    assert not line.verdict and line.point.difference is None and len(line.cards) == 2
    assert alone.base == "./bert" and "outside of a comparison" in alone.headline


def test_a_difference_is_in_margins_and_up_is_better_also_for_a_loss():
    images, texts = image_comparison(), sft_comparison()
    worse = point(images, "lora")
    assert (worse.difference, worse.low, worse.high) == pytest.approx((-8.5, -10.1, -6.9))
    assert worse.gain == pytest.approx((0.802 - 0.673) / (0.887 - 0.673)) and worse.parameters == 27_216
    better = point(texts, "lora-all")
    assert (better.difference, better.low, better.high) == pytest.approx((0.333, -0.499, 1.165), abs=1e-3)
    assert better.gain == pytest.approx((2.214 - 1.797) / (2.214 - 1.803))


@pytest.mark.parametrize("without", ["full", "margin", "interval", "gain"])
def test_an_arm_without_what_a_scale_needs_has_no_point_on_it(without):
    comparison = image_comparison()
    if without == "full":
        del comparison["arms"]["full"]
        comparison["differences"]["lora"]["against"] = "head"
    elif without == "margin":
        comparison["margin"] = comparison["differences"]["lora"]["margin"] = 0
    elif without == "interval":
        comparison["differences"]["lora"]["ci95"] = [None, None]
    else:
        comparison["base"]["metrics"]["test"]["accuracy"] = comparison["arms"]["full"]["metric"]["mean"]
    made = point(comparison, "lora")
    assert (made.gain is None) == (without in ("full", "gain"))
    assert (made.difference is None) == (without != "gain")
    assert point(image_comparison(), "full").difference is None  # the zero of the scale
    assert point(image_comparison(), "lora-wide").difference is None  # out of memory


def test_the_same_folder_gives_the_same_files_and_stale_ones_go(tmp_path):
    root = fill(tmp_path / "runs")
    first, second = write_gallery(root, tmp_path / "a"), write_gallery(root, tmp_path / "b")
    assert first.files == second.files
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in first.files)
    (tmp_path / "a" / "CNAME").write_text("mine")
    shutil.rmtree(root / "images")
    left = write_gallery(root, tmp_path / "a")
    assert set(left.files) < set(first.files) and not (tmp_path / "a" / "pages" / "images-mnist-shift").exists()
    assert (tmp_path / "a" / "CNAME").read_text() == "mine"


def test_a_report_is_rendered_again_only_where_its_comparison_has_changed(tmp_path, monkeypatch):
    rendered = []

    def render(comparison, home):
        rendered.append(comparison["recipe"])
        return "page"

    monkeypatch.setattr(written, "render_html", render)
    root = fill(tmp_path / "runs")
    for _ in range(2):
        write_gallery(root, tmp_path / "site")
    assert rendered == ["mnist-shift", "smollm2-alpaca"]
    write(root / "texts" / "alpaca", "comparison.json", sft_comparison(title="Another"))
    write_gallery(root, tmp_path / "site")
    (tmp_path / "site" / "pages" / "images-mnist-shift" / "report.html").unlink()
    write_gallery(root, tmp_path / "site")
    assert rendered[2:] == ["smollm2-alpaca", "mnist-shift"]


def test_a_manifest_deletes_nothing_outside_of_its_gallery(tmp_path):
    write(tmp_path / "runs" / "alone" / "lora" / "seed-0", "run.json", run())
    (tmp_path / "mine.txt").write_text("mine")
    files = ["../mine.txt", str(tmp_path / "mine.txt"), "gone.html"]
    write(tmp_path / "site", "gallery.json", {"made_by": "peft-recipes gallery", "files": files})
    write_gallery(tmp_path / "runs", tmp_path / "site")
    assert (tmp_path / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: None, "is not there. Name a folder"),
        (lambda root: (root.mkdir(), None)[1], "holds no comparison, run or adapter"),
        (lambda root: write(root, "comparison.json", "{"), "comparison.json: can't be read"),
        (lambda root: root.write_text("x"), "is not a folder"),
    ],
)
def test_a_folder_without_anything_to_show_is_one_line_and_exit_code_2(tmp_path, make, message):
    make(tmp_path / "runs")
    result = CliRunner().invoke(app, ["gallery", str(tmp_path / "runs"), "--output", str(tmp_path / "site")])
    assert result.exit_code == 2 and message in " ".join(result.stderr.split())
    assert len(result.stderr.strip().splitlines()) == 1 and not (tmp_path / "site").exists()


@pytest.mark.parametrize("manifest", [None, "{", "[]", '{"made_by": "another", "files": []}', '{"made_by": 1}'])
def test_a_folder_that_is_not_a_gallery_is_not_written_to(tmp_path, manifest):
    write(tmp_path / "runs" / "alone" / "lora" / "seed-0", "run.json", run())
    write(tmp_path / "site", "index.html", "mine")
    if manifest is not None:
        write(tmp_path / "site", "gallery.json", manifest)
    with pytest.raises(RecipeError, match="not empty and not a gallery"):
        write_gallery(tmp_path / "runs", tmp_path / "site")
    assert (tmp_path / "site" / "index.html").read_text() == "mine"
    with pytest.raises(RecipeError, match="not empty and not a gallery"):
        write_gallery(tmp_path / "runs", tmp_path / "site" / "index.html")


def test_the_command_says_what_is_there_and_what_was_left_out(tmp_path):
    root = fill(tmp_path / "runs")
    call = ["gallery", str(root), "--output", str(tmp_path / "site"), "--title", "Ours <b>"]
    shown = CliRunner().invoke(app, call)
    assert shown.exit_code == 0 and "2 comparisons and 2 other entries" in shown.output
    assert "broken/lora/seed-1: an unfinished run" in shown.output
    assert "<h1>Ours &lt;b&gt;</h1>" in (tmp_path / "site" / "index.html").read_text("utf-8")
    document = json.loads(CliRunner().invoke(app, [*call, "--json"]).stdout)
    assert document["comparisons"] == 2 and "index.html" in document["files"] and len(document["left_out"]) == 7


@pytest.mark.parametrize("where", ["lora/seed-0", "lora", "."])
def test_the_folder_may_be_that_of_a_run_and_the_current_one(tmp_path, monkeypatch, where):
    folder = write(tmp_path / "a name, with signs #1 é" / "lora" / "seed-0", "run.json", run())
    shutil.copy(ROOT / "README.md", folder / "README.md")
    monkeypatch.chdir(folder.parents[1] / where)
    made = write_gallery(Path("."), tmp_path / "site", title="Café & <more>")
    cards = [name for name in made.files if name.startswith("pages/")]
    assert made.others == 1 and len(cards) == 1 and re.fullmatch(r"[\w./-]+", cards[0])
    assert str(tmp_path) not in (tmp_path / "site" / "index.html").read_text("utf-8")


def test_a_folder_that_links_to_itself_is_read_once(tmp_path):
    write(tmp_path / "runs" / "alone" / "lora" / "seed-0", "run.json", run())
    (tmp_path / "runs" / "again").symlink_to(tmp_path / "runs", target_is_directory=True)
    assert len(collect(tmp_path / "runs").runs) == 1


def test_sample_images_are_no_paths():
    kept = json.loads((ROOT / "adapters" / "mnist-shift" / "comparison.json").read_text("utf-8"))
    assert portable(kept)["samples"] == kept["samples"]
    assert portable({"error": "no /home/someone/model there"}) == {"error": "no ./model there"}
    assert portable({"error": f"no {'/home' * 40} there"})["error"] == "no ./home there"
