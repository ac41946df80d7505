#!/bin/bash
# The first process of a node, in namespaces of its own: boot_node.sh NAME FOLDER
set -euo pipefail
name=$1 folder=$2

hostname "$name"
mount --bind "$folder/hosts" /etc/hosts
mount --bind "$folder/nsswitch.conf" /etc/nsswitch.conf # names come from that file alone: no DNS is reached from here
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs "$folder/tmp" # PMIx keeps its sockets there, and the nodes must not share them

trap 'exit 0' TERM
slurmd -D -N "$name" -f "$folder/slurm.conf" &
while true; do # the first process becomes the parent of orphans and has to reap them
    wait || true
    sleep 1
done
