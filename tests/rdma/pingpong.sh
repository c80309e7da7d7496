#!/bin/sh
# Messages and RDMA writes between the two devices by the tools of rdma-core and perftest: that the
# machine itself is sound. Runs in the machine of vm.py.
set -eu

ibv_rc_pingpong -d rxe0 -g 1 -n 100 > /dev/null &
sleep 0.5
ibv_rc_pingpong -d rxe1 -g 1 -n 100 10.9.0.10
wait $!
ib_write_bw -d rxe0 -x 1 -F -n 100 > /dev/null &
sleep 1
ib_write_bw -d rxe1 -x 1 -F -n 100 10.9.0.10 | grep -A 1 '#bytes'
wait $!
