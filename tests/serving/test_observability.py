"""Traces and logs: what a request took and under whose span, one JSON line an event."""

from __future__ import annotations

import itertools
import json
import logging
import subprocess
import sys

import pytest

from prts_core.io.errors import ServeError
from prts_core.robot.groot import GrootClient
from prts_core.robot.openpi import PolicyClient
from prts_core.serving.logs import JsonFormatter, handler
from prts_core.serving.server import PolicyServer
from prts_core.serving.service import GROOT, OPENPI, ServerConfig
from prts_core.serving.tracing import Tracing
from tests.fixtures.running_server import addresses, running
from tests.serving.fake_policy import FakePolicy, groot_observation, observation

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def test_a_request_is_a_trace_of_its_phases_under_the_clients_span():
    pytest.importorskip("opentelemetry.sdk")
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    kept, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(kept))
    about = {"model_version": "7"}
    config = ServerConfig(port=0, groot_port=0, protocols=(OPENPI, GROOT), tracing=Tracing(provider), about=about)
    with addresses(PolicyServer(FakePolicy(delay_s=0.02), config)) as found:
        with PolicyClient(found[OPENPI]) as robot:
            robot.infer(observation(traceparent=PARENT), value=True)
            with pytest.raises(ServeError):
                robot.infer(observation(prompt=""))
        with GrootClient(found[GROOT]) as client:
            client.get_action(groot_observation(2), {"traceparent": PARENT})
            with pytest.raises(ServeError, match="W3C"):
                client.get_action(groot_observation(), {"traceparent": "00-zz"})
    spans = kept.get_finished_spans()
    roots = [span for span in spans if span.name == "request"]
    good = next(root for root in roots if "prts.value" in root.attributes)
    refused = next(root for root in roots if root.attributes["rpc.system"] == OPENPI and root is not good)
    zeromq = next(root for root in roots if root.attributes.get("prts.samples") == 2)
    for root in (good, zeromq):
        assert root.attributes["prts.version"] == "7"
        assert f"{root.context.trace_id:032x}" == PARENT.split("-")[1]
        assert root.parent is not None and f"{root.parent.span_id:016x}" == PARENT.split("-")[2]
        parts = [span for span in spans if span.parent and span.parent.span_id == root.context.span_id]
        assert [span.name for span in parts] == ["decode", "queue", "policy", "encode"]
        assert root.start_time <= parts[0].start_time and parts[-1].end_time <= root.end_time
        assert all(one.end_time <= other.start_time + 10_000 for one, other in itertools.pairwise(parts))
        policy = parts[2]
        assert policy.end_time - policy.start_time >= 20_000_000
    assert not refused.status.is_ok and "needs a sentence" in str(refused.status.description)


def test_nothing_of_opentelemetry_is_imported_unless_it_is_asked_for():
    code = "import sys, prts_core.serving.server, prts_core.cli.serve; assert 'opentelemetry' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_log_is_a_json_object_an_event(capsys):
    logger = logging.getLogger("prts.serve")
    there = handler(True)
    logger.addHandler(there)
    before = logger.level
    logger.setLevel(logging.INFO)
    try:
        with running(PolicyServer(FakePolicy(), ServerConfig(port=0))) as url, PolicyClient(url) as robot:
            robot.infer(observation())
            with pytest.raises(ServeError):
                robot.infer(observation(prompt="explode"))
    finally:
        logger.removeHandler(there)
        logger.setLevel(before)
    events = [json.loads(line) for line in capsys.readouterr().err.splitlines() if line.startswith("{")]
    answered = next(event for event in events if event["message"].startswith("answered"))
    assert answered["client"].startswith("openpi@127.0.0.1:") and answered["level"] == "info"
    assert answered["policy_ms"] >= 0 and answered["all_ms"] >= answered["policy_ms"]
    failed = next(event for event in events if "the policy failed" in event["message"])
    assert "RuntimeError" in failed["error"] and failed["level"] == "error"
    refused = next(event for event in events if event["message"].startswith("refused"))
    assert refused["client"] == answered["client"]


def test_an_event_is_one_line_whatever_it_says():
    record = logging.makeLogRecord({"msg": "two\nlines of %s", "args": ("Käse",), "levelname": "WARNING", "who": {1}})
    line = JsonFormatter().format(record)
    assert "\n" not in line and json.loads(line)["message"] == "two\nlines of Käse" and json.loads(line)["who"] == "{1}"
