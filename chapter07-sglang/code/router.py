"""A router for OpenAI servers: one address, many workers, and none of their failures at a client.

It takes requests in on one port and hands each to a worker, by a policy: in turns, by load, by a
hash, or by what the workers' prefix caches hold (cache_aware; exactly, where they publish KV
events). A request that has not begun to answer is asked elsewhere when its worker fails; a stream
that has begun goes on at another worker with the tokens so far. Workers that are dead, that hang
or that answer with errors are left alone until they answer again. A second port is for the
operator: workers come and go there while it runs.

Run:
    python -m llm_router.fake_worker --port 8231 &
    python -m llm_router.fake_worker --port 8232 &
    python chapter07-sglang/code/router.py --workers http://127.0.0.1:8231 http://127.0.0.1:8232

You should see: `router at http://127.0.0.1:8220`. Every OpenAI client can use it by that address;
/metrics there tells Prometheus what it does, and http://127.0.0.1:8221/docs how to add a worker.
"""

from argparse import Namespace

from distlab import script
from distlab.script import UsageError
from llm_router.balancer import Settings
from llm_router.policies import POLICIES
from llm_router.serving import serve

PRESETS: dict[str, dict] = {"smoke": {}, "laptop": {}, "gpu": {}}


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    serve(args, settings_of(args))
    return 0


def parse_args(argv: list[str] | None) -> Namespace:
    parser = script.Parser(__doc__, PRESETS)
    add = parser.add_argument
    add("--workers", nargs="*", default=[], metavar="URL", help="such as http://127.0.0.1:8000")
    add("--policy", default="cache_aware", help=f"{', '.join(POLICIES)} (default: cache_aware)")
    add("--host", default="127.0.0.1")
    add("--port", type=script.non_negative_int, default=8220, help="0: a free one")
    add("--control-host", default="127.0.0.1", help="for those who may change the workers")
    add("--control-port", type=script.non_negative_int, default=8221)
    group = parser.add_argument_group("cache_aware")
    add = group.add_argument
    add("--tokenizer", metavar="DIR", help="the workers' (default: prefixes of text, not tokens)")
    add("--block-size", type=script.positive_int, default=16, help="tokens; the workers'")
    add("--kv-events", nargs="*", metavar="ENDPOINT", help="of each worker: tcp://127.0.0.1:5557")
    add("--guess-blocks", type=script.positive_int, default=4096, metavar="N",
        help="that a worker without KV events is believed to hold")  # fmt: skip
    group = parser.add_argument_group("limits")
    add = group.add_argument
    add("--max-concurrent", type=script.positive_int, default=256, help="requests at the workers")
    add("--queue-size", type=script.non_negative_int, default=256, help="more are refused: 429")
    add("--queue-timeout", type=script.seconds, default=30.0, help="seconds")
    add("--request-timeout", type=script.seconds, default=600.0, help="seconds")
    add("--max-body-bytes", type=script.positive_int, default=32 * 2**20)
    add("--hang-after", type=script.seconds, default=0.5,
        help="seconds of silence before a busy worker is asked for one token")  # fmt: skip
    add("--probe-timeout", type=script.seconds, default=1.0, help="seconds; of a probe's answer")
    add(
        "--grace",
        type=script.seconds,
        default=30.0,
        help="seconds to end requests on SIGTERM; a second one ends it",
    )
    args = parser.parse_args(argv)
    if args.policy not in POLICIES:
        raise UsageError(f"--policy {args.policy} is unknown; use {', '.join(POLICIES)}")
    if args.kv_events and args.policy != "cache_aware":
        raise UsageError("--kv-events are read by --policy cache_aware only; add it")
    return args  # type: ignore[no-any-return]


def settings_of(args: Namespace) -> Settings:
    names = ("max_concurrent", "queue_size", "queue_timeout", "request_timeout", "max_body_bytes",
             "hang_after", "probe_timeout")  # fmt: skip
    return Settings(**{name: getattr(args, name) for name in names})


if __name__ == "__main__":
    script.exit(main)
