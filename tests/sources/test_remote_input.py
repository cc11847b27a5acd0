"""Inputs that are not local: a real S3 server (moto) and a real web server, both on loopback."""

import contextlib
import functools
import gzip
import http.server
import threading

import orjson
import pytest

from data_prep.sources.documents import read_documents
from data_prep.sources.inputs import InputConfig, OnError, find_units
from data_prep.sources.rejects import Rejects
from data_prep.tokens.tokenize_job import TokenizeConfig, main
from pipeline import cli
from pipeline.data.manifest import Manifest
from pipeline.errors import DataError
from pipeline.remote import connect
from tests.support.corpus import make_texts, make_tokenizer, write_jsonl
from tests.support.s3_server import s3_server

TEXTS = make_texts(60)


@pytest.fixture(scope="module")
def s3():
    with s3_server() as address:
        yield address


@pytest.fixture(scope="module")
def bucket(s3):
    import boto3

    client = boto3.client("s3", endpoint_url=s3)
    client.create_bucket(Bucket="crawl")
    lines = [b'{"text": %s}\n' % orjson.dumps(text) for text in TEXTS]
    client.put_object(Bucket="crawl", Key="web/a.jsonl", Body=b"".join(lines[:40]))
    client.put_object(
        Bucket="crawl", Key="web/b.jsonl.gz", Body=gzip.compress(b"".join(lines[40:]))
    )
    client.put_object(Bucket="crawl", Key="web/notes.bin", Body=b"\0")
    return "s3://crawl"


def read(address, **settings):
    cfg = InputConfig(input=address, **settings)
    return [
        d.text for unit in find_units(cfg) for d in read_documents(unit, cfg, Rejects(OnError.fail))
    ]


@pytest.mark.parametrize("place", ["web", "web/", "web/*.jsonl*"])
def test_s3_folders_and_globs_are_read(bucket, place):
    assert read(f"{bucket}/{place}") == TEXTS


def test_s3_files_are_cut_by_byte_ranges(bucket):
    cfg = InputConfig(input=f"{bucket}/web/a.jsonl", unit_mb=0.001)
    assert len(find_units(cfg)) > 3
    assert read(f"{bucket}/web/a.jsonl", unit_mb=0.001) == TEXTS[:40]


@pytest.mark.parametrize("place", ["web", "web/*.jsonl"])
def test_no_listing_is_kept_for_opening_to_search(bucket, place):
    """fsspec looks for a file it opens through all names of its folder: n inputs took n squared."""
    assert find_units(InputConfig(input=f"{bucket}/{place}"))
    assert len(connect(bucket)[0].dircache) == 0


def test_a_missing_s3_place_is_named(bucket):
    with pytest.raises(DataError, match="s3://nowhere/x"):
        read("s3://nowhere/x/*.jsonl")


def test_tokenizing_from_s3_gives_the_bytes_of_the_local_file(bucket, tmp_path):
    make_tokenizer(tmp_path / "tokenizer.json")
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    for name, address in (("local", tmp_path / "a.jsonl"), ("remote", f"{bucket}/web")):
        words = [
            f"input=web={address}",
            f"output={tmp_path}/{name}",
            f"tokenizer={tmp_path}/tokenizer.json",
        ]
        main(cli.compose(TokenizeConfig, [*words, "workers=1", "unit_mb=1"], config="tokenize"))
    local, remote = (Manifest.load(tmp_path / name / "train") for name in ("local", "remote"))
    assert local.tokens == remote.tokens
    assert local.sha256 == remote.sha256


@contextlib.contextmanager
def web_server(folder):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder))
    )
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_http_files_are_read_plain_and_compressed(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    with web_server(tmp_path) as address:
        assert read(f"{address}/a.jsonl") == TEXTS
        assert read(f"{address}/a.jsonl.gz") == TEXTS
        with pytest.raises(DataError, match="nowhere.jsonl cannot be listed"):
            read(f"{address}/nowhere.jsonl")
