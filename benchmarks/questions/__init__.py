"""What is asked: one module for each question, with a function that returns the tables that answer it."""

from benchmarks.questions._question import Question, Settings
from benchmarks.questions.frameworks import Frameworks
from benchmarks.questions.idle import Idle
from benchmarks.questions.inspector import Inspected
from benchmarks.questions.lookup import SessionLookup
from benchmarks.questions.monitor import MonitorLookup
from benchmarks.questions.requests import Requests
from benchmarks.questions.resolving import Resolving
from benchmarks.questions.sidecar import SidecarRequests
from benchmarks.questions.slow_readers import SlowReaders
from benchmarks.questions.testing import Tests

QUESTIONS: dict[str, type[Question]] = {
    question.name: question
    for question in (
        Idle,
        SessionLookup,
        Requests,
        Frameworks,
        SlowReaders,
        MonitorLookup,
        SidecarRequests,
        Inspected,
        Resolving,
        Tests,
    )
}

__all__ = ["QUESTIONS", "Question", "Settings"]
