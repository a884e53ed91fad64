"""Write the log as JSON, a line an event, for whoever collects logs."""

from __future__ import annotations

import json
import logging
import time

_PLAIN = set(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class JsonFormatter(logging.Formatter):
    """at (UTC), level, logger, message; fields that the event was given; error: a traceback, where there is one."""

    def format(self, record: logging.LogRecord) -> str:
        at = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        told = {"at": f"{at}.{int(record.msecs):03d}Z", "level": record.levelname.lower(), "logger": record.name}
        told |= {"message": record.getMessage()}
        told |= {name: value for name, value in vars(record).items() if name not in _PLAIN}
        if record.exc_info:
            told["error"] = self.formatException(record.exc_info)
        return json.dumps(told, default=str, ensure_ascii=False)


def handler(as_json: bool) -> logging.Handler:
    """To standard error, as text or as JSON."""
    found = logging.StreamHandler()
    found.setFormatter(JsonFormatter() if as_json else logging.Formatter("%(name)s: %(message)s"))
    return found
