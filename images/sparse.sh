#!/bin/sh
# sparse as make calls it for the kernel module.
#
# Debian's sparse is older than the 7.3 headers: it knows no __typeof_unqual__,
# and does not fold the strlen of a literal, which MODULE_INFO() asserts on.
exec sparse -D__typeof_unqual__=__typeof__ '-D__builtin_strlen(s)=(sizeof(s) - 1)' "$@"
