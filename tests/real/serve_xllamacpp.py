"""llama.cpp's own HTTP server, out of the wheel `xllamacpp`: the real runner of the tests.

It prints one line, `ready`, when the model is loaded; every route answers 503 before.
"""

import argparse
import os
import signal

import xllamacpp


def arguments() -> argparse.Namespace:
    """What a test may choose."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", help="a GGUF file")
    parser.add_argument("port", type=int)
    parser.add_argument("--slots", type=int, default=2, help="requests that it runs at once")
    parser.add_argument("--embeddings", action="store_true", help="give embeddings, too")
    parser.add_argument("--context", type=int, default=16384, help="tokens over all slots")
    return parser.parse_args()


def main() -> None:
    """Serve until SIGTERM or SIGINT; the process then ends at once, open answers and all."""
    wanted = arguments()
    stops = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, stops)  # the server's threads inherit it

    params = xllamacpp.CommonParams()
    params.model.path = wanted.model
    params.model_alias = {"counter"}
    params.port = wanted.port
    params.n_parallel = wanted.slots
    params.n_ctx = wanted.context
    params.cpuparams.n_threads = 1  # the tests share the machine
    params.endpoint_slots = True
    params.warmup = False
    if wanted.embeddings:
        params.embedding = True
        params.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_MEAN
    server = xllamacpp.Server(params)
    print("ready", server.listening_address, flush=True)
    signal.sigwait(stops)
    os._exit(0)


if __name__ == "__main__":
    main()
