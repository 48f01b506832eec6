"""The chat page: its files and nothing else, with a strict policy; and requests that a browser sends from elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from bmojo_edge.engine import LM
from bmojo_edge.server import static
from bmojo_edge.tokenizer import Tokenizer
from tests.unit.serving import Served, serving
from tests.unit.test_generation_engines import make


@pytest.fixture(scope="module")
def lm(byte_level_folder: Path) -> LM:
    return make("mlx", Tokenizer.load(byte_level_folder))


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site") / "page"
    (folder / "parts").mkdir(parents=True)
    (folder / "index.html").write_text("<!doctype html><title>chat</title>", encoding="utf-8")
    (folder / "parts" / "app.js").write_text("export {}", encoding="utf-8")
    (folder.parent / "secret.txt").write_text("secret", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def served(lm: LM, pages: Path) -> Iterator[Served]:
    with serving(lm, api_key="key", pages=pages, hosts=frozenset({"127.0.0.1"})) as served:
        yield served


def test_the_page_needs_no_key_and_has_a_policy(served: Served) -> None:
    response = served.http.get("/")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/html")
    assert "default-src 'self'" in response.headers["content-security-policy"]
    assert response.headers["x-content-type-options"] == "nosniff"
    script = served.http.get("/parts/app.js")
    assert script.headers["content-type"].startswith("text/javascript")
    assert script.text == "export {}"
    assert served.http.head("/").status_code == 200
    assert served.http.get("/v1/sessions").status_code == 401


@pytest.mark.parametrize(
    "path", ["/../secret.txt", "/%2e%2e/secret.txt", "/..%2fsecret.txt", "/parts/../../secret.txt", "/parts", "/parts/"]
)
def test_nothing_else_is_served(served: Served, path: str) -> None:
    response = served.http.get(path, headers={"authorization": "Bearer key"})
    assert response.status_code == 404
    assert "secret" not in response.text


def test_without_a_page(lm: LM, tmp_path: Path) -> None:
    with serving(lm) as served:
        assert served.http.get("/").status_code == 404
    with pytest.raises(ValueError, match=r"no index\.html"):
        static.files(tmp_path)


def test_pages_from_elsewhere_change_nothing(served: Served) -> None:
    """A name that was made to lead here reads nothing, and another origin posts nothing."""
    key = {"authorization": "Bearer key"}
    for host, status in (("evil.example", 421), ("evil.example:8080", 421), ("127.0.0.1:8080", 200), ("", 421)):
        assert served.http.get("/v1/sessions", headers={**key, "host": host}).status_code == status
    for origin, status in (("https://evil.example", 403), ("null", 403), (served.address, 201)):
        headers = {**key, "origin": origin}
        response = served.http.post("/v1/sessions", json={}, headers=headers)
        assert response.status_code == status
        assert not any(name.startswith("access-control") for name in response.headers)


@pytest.mark.parametrize("origins", [{"https://friend.example", "http://localhost:3000"}, {"*"}])
def test_pages_that_are_allowed(lm: LM, origins: set[str]) -> None:
    friend = {"origin": "https://friend.example"}
    asks = {**friend, "access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    with serving(lm, api_key="key", origins=frozenset(origins)) as served:
        may = served.http.options("/v1/sessions", headers=asks)  # a browser asks without the key
        assert may.status_code == 200
        assert may.headers["access-control-allow-origin"] in ("https://friend.example", "*")
        assert "POST" in may.headers["access-control-allow-methods"]
        assert "authorization" in may.headers["access-control-allow-headers"]
        for headers, status in (({}, 401), ({"authorization": "Bearer key"}, 201)):
            response = served.http.post("/v1/sessions", json={}, headers={**friend, **headers})
            assert response.status_code == status
            assert response.headers["access-control-allow-origin"] in ("https://friend.example", "*")
        key = {"authorization": "Bearer key", "origin": "https://evil.example"}
        assert served.http.post("/v1/sessions", json={}, headers=key).status_code == (201 if "*" in origins else 403)
        refused = served.http.options("/v1/sessions", headers={**asks, "origin": "https://evil.example"})
        assert ("access-control-allow-origin" in refused.headers) == ("*" in origins)
