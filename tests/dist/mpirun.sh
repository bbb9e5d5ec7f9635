#!/bin/sh
# mpirun.sh NP [options of mpirun --] program [arguments]: how tests start MPI programs. The only place
# that holds the options: point-to-point over shared memory and the loopback interface, ranks that
# share processors yield, nothing is bound. MOED_MPIRUN_TIMEOUT (seconds, 100) ends a run that hangs, as
# a failure (124). MOED_MPIRUN_BTL names other ways for messages (self,tcp).
set -eu
np=$1
shift
extra=
for word in "$@"; do
    if [ "$word" = "--" ]; then
        while [ "$1" != "--" ]; do
            extra="$extra $1"
            shift
        done
        shift
        break
    fi
done
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
mpirun=$(command -v mpirun.openmpi || command -v mpirun)
# $extra holds words without blanks.
# shellcheck disable=SC2086
exec timeout -k 5 "${MOED_MPIRUN_TIMEOUT:-100}" "$mpirun" --oversubscribe --bind-to none \
    --mca pml ob1 --mca btl "${MOED_MPIRUN_BTL:-self,vader,tcp}" --mca btl_tcp_if_include lo --mca oob_tcp_if_include lo \
    --mca mpi_yield_when_idle 1 --mca odls_base_sigkill_timeout 0 \
    $extra -np "$np" "$@" </dev/null
