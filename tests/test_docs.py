"""The site of guides and reference builds, with every link whole and nothing fetched from elsewhere."""

import importlib.util

import pytest

pytest.importorskip("mkdocstrings")


@pytest.fixture
def site(root):
    spec = importlib.util.spec_from_file_location("site_of_docs", root / "docs" / "site.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_the_site_builds(site, tmp_path):
    made = site.build(tmp_path)
    reference = (made / "reference" / "common.checks.html").read_text()
    assert "A mistake that the user can mend" in reference
    assert not site.pages_that_fetch(made)


def test_a_page_that_fetches_is_found(site, tmp_path):
    (tmp_path / "a.html").write_text('<a href="https://example.org">read</a><img src="x.png">')
    assert site.pages_that_fetch(tmp_path) == []
    for part in (
        '<script src="https://a/b.js">',
        '<link rel="stylesheet" href="//a/b.css">',
        "<img alt=x src=http://a/b>",
    ):
        (tmp_path / "b.html").write_text(part)
        assert site.pages_that_fetch(tmp_path) == ["b.html"]


def test_every_public_module_has_a_page(site, root, tmp_path):
    names = site.write_reference(tmp_path)
    assert {"common.clip", "clipcap.decoding", "dietnerf.poses", "recycle_gpt2.alignment"} <= set(names)
    assert len(names) > 60
