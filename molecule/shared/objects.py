"""A real object store that speaks S3: OpenStack Swift of Debian, whole on one test host."""

from __future__ import annotations

from dataclasses import dataclass

from fleet import Host

NAME = "objects.test"
KEY, SECRET = "tests:keeper", "a-secret-of-the-tests"
BUCKET = "backups"
SERVERS = {"account": 6202, "container": 6201, "object": 6200}
BEFORE = """
set -eu
export DEBIAN_FRONTEND=noninteractive
apt-get -qq update
apt-get -qq install -y --no-install-recommends swift-proxy swift-account swift-container swift-object memcached \
  python3-swiftclient >/dev/null 2>&1
mkdir -p /srv/swift/one
cd /etc/swift
openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -keyout key.pem -out cert.pem -days 30 \
  -subj /CN=$name -addext subjectAltName=DNS:$name 2>/dev/null
cat >swift.conf <<EOF
[swift-hash]
swift_hash_path_suffix = tests
[storage-policy:0]
name = one
default = yes
EOF
"""
SERVER = """
cat >$kind-server.conf <<EOF
[DEFAULT]
bind_ip = 127.0.0.1
bind_port = $port
devices = /srv/swift
mount_check = false
workers = 0
[pipeline:main]
pipeline = $kind-server
[app:$kind-server]
use = egg:swift#$kind
EOF
swift-ring-builder $kind.builder create 4 1 1
swift-ring-builder $kind.builder add r1z1-127.0.0.1:$port/one 1
swift-ring-builder $kind.builder rebalance
"""
# Swift adds what else its pipeline needs.
PROXY = """
cat >proxy-server.conf <<EOF
[DEFAULT]
bind_ip = 0.0.0.0
bind_port = 8443
cert_file = /etc/swift/cert.pem
key_file = /etc/swift/key.pem
workers = 0
[pipeline:main]
pipeline = catch_errors gatekeeper cache s3api tempauth bulk slo dlo proxy-server
[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true
[filter:tempauth]
use = egg:swift#tempauth
user_tests_keeper = $secret .admin
[filter:cache]
use = egg:swift#memcache
EOF
for filter in catch_errors gatekeeper s3api bulk slo dlo; do
  printf '[filter:%s]\\nuse = egg:swift#%s\\n' $filter $filter >>proxy-server.conf
done
chown -R swift: /etc/swift /srv/swift
for kind in account container object proxy; do
  systemd-run --unit=objects-$kind -p User=swift swift-$kind-server /etc/swift/$kind-server.conf
done
ask="swift --insecure -A https://127.0.0.1:8443/auth/v1.0 -U tests:keeper -K $secret"
timeout 60 sh -c "until $ask post $bucket; do sleep 1; done" 2>/dev/null
if nft list table inet ragrack >/dev/null 2>&1; then
  nft insert rule inet ragrack input tcp dport 8443 accept
fi
"""


@dataclass(frozen=True)
class Store:
    """Where it is, and the certificate that it shows."""

    host: Host
    certificate: str

    @property
    def bucket(self) -> str:
        """As restic and our variables name it."""
        return f"s3:https://{NAME}:8443/{BUCKET}"

    def introduce(self, client: Host) -> None:
        """As an operator does with a server in the house: a name, and trust in its certificate."""
        client.run(f"grep -q ' {NAME}$' /etc/hosts || echo '{self.host.address} {NAME}' >>/etc/hosts")
        client.run(
            f"cat >/usr/local/share/ca-certificates/objects.crt <<'EOF'\n{self.certificate}\nEOF\n"
            "update-ca-certificates >/dev/null 2>&1"
        )


def serve(host: Host) -> Store:
    servers = "".join(f"kind={kind} port={port}\n{SERVER}" for kind, port in SERVERS.items())
    host.run(f"name={NAME} secret={SECRET} bucket={BUCKET}\n{BEFORE}{servers}{PROXY}")
    return Store(host, host.run("cat /etc/swift/cert.pem"))


def stop(store: Store) -> None:
    store.host.run("systemctl stop 'objects-*'")
