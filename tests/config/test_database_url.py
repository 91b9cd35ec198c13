"""The password of a database comes from the environment, and stands nowhere else."""

import copy
import pickle
import shlex
from pathlib import Path

import pytest
import sqlalchemy

from nanovlm import cli
from nanovlm.config.database_url import PLACEHOLDER, fill_in, hide_password, without_password_of
from nanovlm.config.search_settings import Study
from nanovlm.config.space import load_space
from nanovlm.errors import UserError
from nanovlm.results.folder import describe_environment

URL = "postgresql+psycopg://me:hush@host:5432/db?sslmode=require"
QUERY = "postgresql+psycopg:///db?host=h&user=me&password=hush&sslmode=require"
SHOWN = "postgresql+psycopg://me:***@host:5432/db?sslmode=require"
SHOWN_QUERY = "postgresql+psycopg:///db?host=h&user=me&password=***&sslmode=require"


@pytest.mark.parametrize(
    "url",
    [
        URL,
        "postgresql://host/db",
        "postgresql://me@host/db",
        "postgresql://me:hush@[::1]:5432/db",
        "mysql+pymysql://me:h%40u%2Fsh@host/db?charset=utf8mb4",
        "postgresql://me:hush@/db?host=%2Fvar%2Frun",
        "postgresql://:hush@host/db",
    ],
)
def test_an_url_is_shown_as_sqlalchemy_shows_it(url: str) -> None:
    assert hide_password(url) == sqlalchemy.make_url(url).render_as_string(hide_password=True)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        (QUERY, SHOWN_QUERY),
        ("mysql://h/db?passwd=hush", "mysql://h/db?passwd=***"),
        ("mysql://h/db?SSL_Password=hu%20sh&a=1", "mysql://h/db?SSL_Password=***&a=1"),
        ("postgresql://me:hu@sh@host/db", "postgresql://me:***@host/db"),
        ("postgresql://me:hu/s h@host/db", "postgresql://me:***@host/db"),
        (f"postgresql://me:{PLACEHOLDER}@host/db", f"postgresql://me:{PLACEHOLDER}@host/db"),
        ("postgresql://me:${A}hush@host/db", "postgresql://me:***@host/db"),
        ("nonsense", "nonsense"),
    ],
)
def test_what_sqlalchemy_shows_is_hidden_too(url: str, shown: str) -> None:
    assert hide_password(url) == shown


def test_what_a_driver_says_is_told_without_the_password() -> None:
    said = "invalid dsn: user=me password=hu sh host=h"
    assert "hu sh" not in without_password_of("postgresql://h/db?password=hu+sh", said)
    assert "hu sh" not in without_password_of("postgresql://me:hu%20sh@h/db", said)
    assert without_password_of("postgresql://me:@h/db", said) == said


@pytest.mark.parametrize("password", ["hush", "p@ss:w/rd?&=%", "größe 🙂"])
def test_a_variable_gives_the_password_as_it_is(
    password: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NANOVLM_DB_PASSWORD", password)
    url = sqlalchemy.make_url(fill_in(f"postgresql://me:{PLACEHOLDER}@host/db"))
    assert (url.password, url.host, url.database) == (password, "host", "db")
    in_query = sqlalchemy.make_url(fill_in(f"postgresql:///db?user=me&password={PLACEHOLDER}"))
    assert in_query.query["password"] == password


def test_a_variable_may_be_the_whole_url(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", URL)
    assert fill_in("${DATABASE_URL}") == URL
    assert hide_password("${DATABASE_URL}") == "${DATABASE_URL}"


def test_a_variable_that_is_not_set_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NANOVLM_DB_PASSWORD", raising=False)
    with pytest.raises(UserError) as refused:
        fill_in(f"postgresql://me:{PLACEHOLDER}@host/db")
    assert str(refused.value) == (
        f"study.storage: postgresql://me:{PLACEHOLDER}@host/db needs the environment variable "
        "NANOVLM_DB_PASSWORD, which is not set"
    )


@pytest.mark.parametrize("url", [URL, QUERY])
def test_a_space_is_written_and_pickled_without_the_password(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "space.yaml"
    path.write_text("search: {lr_mp: {log_uniform: [1e-4, 1e-1]}}")
    space = load_space(path, {"study.storage": url})
    assert space.study.storage == url and copy.deepcopy(space).study == space.study
    assert b"hush" not in pickle.dumps(space)
    again = pickle.loads(pickle.dumps(space)).study
    path.write_text(space.to_yaml())
    assert load_space(path).study == again
    assert "hush" not in path.read_text()
    monkeypatch.setenv("NANOVLM_DB_PASSWORD", "hush")
    assert fill_in(str(again.storage)) == url


def test_the_command_that_is_shown_and_written_down_has_no_password(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = ["--space", "s.yaml", f"study.storage={URL}", f"study={{storage: '{QUERY}'}}", "a=b"]
    monkeypatch.setattr("sys.argv", ["run_search.py", *words])
    resumed = cli.resume_words(words, Path("results/demo"))
    assert describe_environment()["command"] == ["run_search.py", *resumed[:-3]]
    assert "hush" not in shlex.join(resumed)
    monkeypatch.setenv("NANOVLM_DB_PASSWORD", "hush")
    assert [fill_in(word) for word in resumed] == [*words, "--name", "demo", "--resume"]


@pytest.mark.parametrize(("url", "shown"), [(URL, SHOWN), (QUERY, SHOWN_QUERY)])
def test_no_message_of_a_program_has_the_password(
    url: str, shown: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse() -> int:
        raise UserError(f"command line: {url!r} is not of the form key=value, see https://x.org")

    with pytest.raises(SystemExit):
        cli.run_program(refuse)
    said = capsys.readouterr().err
    assert said == (
        f"error: command line: {shown!r} is not of the form key=value, see https://x.org\n"
    )
    assert Study(storage=url).shown_storage == shown
