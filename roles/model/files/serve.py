"""Serves one GGUF model by llama.cpp's own OpenAI-compatible server. systemd starts it, with Type=notify."""

import argparse
import os
import signal
import socket

import xllamacpp

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", required=True)
parser.add_argument("--name", required=True)
parser.add_argument("--address", default="127.0.0.1")
parser.add_argument("--port", type=int, default=8081)
parser.add_argument("--context", type=int, default=4096)
parser.add_argument("--parallel", type=int, default=2)
parser.add_argument("--threads", type=int, default=1)
parser.add_argument("--cache-ram-mib", type=int, default=128)
args = parser.parse_args()

params = xllamacpp.CommonParams()
params.model.path = args.model
params.model_alias = {args.name}
params.hostnames = [args.address]
params.port = args.port
params.n_ctx = args.context
params.n_parallel = args.parallel
params.kv_unified = True
params.cpuparams.n_threads = args.threads
params.cpuparams_batch.n_threads = args.threads
params.n_threads_http = args.parallel + 2
params.cache_ram_mib = args.cache_ram_mib
params.offline = True
params.ui = False
params.endpoint_slots = False
# By default any web page that the user has open may ask.
params.cors_origins = ""
params.cors_credentials = False
params.verbosity = 1

# Threads inherit the mask: the signal comes to sigwait below and to nobody else.
stop = {signal.SIGTERM, signal.SIGINT}
signal.pthread_sigmask(signal.SIG_BLOCK, stop)
server = xllamacpp.Server(params)  # returns when the model is loaded and the port answers

if address := os.environ.get("NOTIFY_SOCKET"):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.connect(address.replace("@", "\0", 1))
        notify.send(b"READY=1")
signal.sigwait(stop)
del server
