import hashlib
import json
import os
import time
import uuid

from django.conf import settings
from django.core.exceptions import BadRequest
from django.db import connection
from django.http import JsonResponse, StreamingHttpResponse
from django.views.decorators.csrf import csrf_exempt
from django.views.decorators.http import require_GET, require_http_methods

import zdd_web

from .models import Item, Job

MAX_SECONDS = 120


def envelope(**body):
    return {**body, "version": settings.VERSION, "generation": zdd_web.generation()}


def bad_request(request, exception):
    # Only our own words: other exceptions that end here (a forbidden Host) quote settings.
    message = str(exception) if isinstance(exception, BadRequest) else "bad request"
    return JsonResponse(envelope(error=message), status=400)


def seconds_argument(request, default):
    text = request.GET.get("seconds")
    if text is None:
        return default
    try:
        seconds = float(text)
    except ValueError:
        seconds = float("nan")
    if not 0 <= seconds <= MAX_SECONDS:  # false for nan, too
        raise BadRequest(f"seconds must be a number from 0 to {MAX_SECONDS}, not {text!r}")
    return seconds


@require_GET
def index(request):
    return JsonResponse(envelope(app="example-django", pid=os.getpid()))


@csrf_exempt
@require_http_methods(["GET", "POST"])
def items(request):
    if request.method == "GET":
        return JsonResponse(envelope(items=list(Item.objects.order_by("-id").values("id", "name")[:100])))
    try:
        body = json.loads(request.body)
    except ValueError:
        body = None
    name = body.get("name") if isinstance(body, dict) else None
    if not isinstance(name, str) or not name:
        raise BadRequest('send JSON with a name: {"name": "..."}')
    item = Item.objects.create(name=name)
    return JsonResponse(envelope(id=item.id, name=item.name), status=201)


@require_GET
def slow(request):
    seconds = seconds_argument(request, default=2)
    time.sleep(seconds)
    return JsonResponse(envelope(slept=seconds, pid=os.getpid()))


@require_GET
def stream(request):
    seconds = seconds_argument(request, default=5)
    return StreamingHttpResponse(lines(seconds), content_type="application/x-ndjson")


def lines(seconds):
    start = time.monotonic()
    end = start + seconds
    while (now := time.monotonic()) < end:
        yield json.dumps(envelope(elapsed=round(now - start, 1), done=False)) + "\n"
        time.sleep(min(0.5, max(0, end - time.monotonic())))
    yield json.dumps(envelope(elapsed=round(time.monotonic() - start, 1), done=True)) + "\n"


@csrf_exempt
@require_http_methods(["POST", "PUT"])
def upload(request):
    # Django reads no further than Content-Length, so a chunked body looks empty to it. gunicorn's
    # own stream ends where the body ends.
    body = request.META["wsgi.input"] if request.META.get("wsgi.input_terminated") else request
    digest, size = hashlib.sha256(), 0
    while chunk := body.read(64 * 1024):
        digest.update(chunk)
        size += len(chunk)
    return JsonResponse(envelope(bytes=size, sha256=digest.hexdigest()))


@csrf_exempt
@require_http_methods(["GET", "POST"])
def jobs(request):
    if request.method == "GET" and "seconds" not in request.GET:
        # A job carries the version and generation that finished it, the reply those that answer.
        return JsonResponse(envelope(jobs=list(Job.objects.order_by("finished_at").values())))
    seconds = seconds_argument(request, default=5)
    job_id = uuid.uuid4().hex
    # zdd_web waits for it: at a stop, and before a retired generation exits.
    zdd_web.background.go(work, job_id, seconds, name=f"job {job_id} ({seconds:g} s)")
    return JsonResponse(envelope(job=job_id, seconds=seconds), status=202)


def work(job_id, seconds):
    time.sleep(seconds)
    try:
        Job.objects.create(
            id=job_id,
            status="done",
            seconds=seconds,
            version=settings.VERSION,
            generation=zdd_web.generation(),
        )
    finally:
        connection.close()  # this thread's: Django closes only those of requests
