#!/bin/sh
# Writes src/verbs.rs and src/ucp.rs: declarations of libibverbs and libucp, as bindgen reads them
# from the headers of Debian 12 (rdma-core 44, UCX 1.13) in the image of tests/rdma/vm.py.
#
# Needs bindgen 0.72 (cargo install bindgen-cli) and libclang. Not part of any build: what it writes
# is committed.
set -eu
cd "$(dirname "$0")"
include=$(../tests/rdma/vm.py prepare)/include
# libclang from elsewhere than a compiler's package has no headers of its own.
builtin=$(${CC:-cc} -print-file-name=include)

declare_library() { # MODULE LIBRARY HEADER FUNCTIONS TYPES CONSTANTS
  header=$(mktemp --suffix .h)
  echo "#include <$3>" > "$header"
  bindgen "$header" --dynamic-loading "$2" --dynamic-link-require-all \
    --allowlist-function "$4" --allowlist-type "$5" --allowlist-var "$6" \
    --default-enum-style consts --no-prepend-enum-name --with-derive-default --no-doc-comments \
    --no-layout-tests --use-core --rust-target 1.85 --rust-edition 2024 --disable-header-comment \
    --raw-line "//! Declarations of $2, written by generate.sh from <$3>." \
    --raw-line '#![allow(clippy::all, clippy::pedantic, missing_docs, nonstandard_style, unreachable_pub,' \
    --raw-line '    missing_debug_implementations, clippy::allow_attributes, clippy::missing_safety_doc,' \
    --raw-line '    clippy::undocumented_unsafe_blocks, clippy::multiple_unsafe_ops_per_block, clippy::use_self,' \
    --raw-line '    unused_qualifications, trivial_numeric_casts, unsafe_op_in_unsafe_fn, reason = "generated")]' \
    -- "-I$include" "-I$builtin" |
    # Opening is done by hand, with errors that say what was looked for.
    awk '/pub unsafe fn new<P>/ { skip = 1 } !skip { print } skip && /^    }/ { skip = 0 }' > "src/$1.rs"
  rm "$header"
  rustfmt --edition 2024 "src/$1.rs"
}

declare_library verbs Verbs infiniband/verbs.h \
  'ibv_(get_device_list|free_device_list|get_device_name|open_device|close_device|query_device|query_port|query_gid|alloc_pd|dealloc_pd|reg_mr|dereg_mr|create_comp_channel|destroy_comp_channel|create_cq|destroy_cq|get_cq_event|ack_cq_events|create_qp|modify_qp|destroy_qp|get_async_event|ack_async_event|wc_status_str)' \
  'ibv_(send_wr|recv_wr|wc|sge|context|access_flags|wc_status|wc_opcode|wr_opcode|send_flags|qp_attr|qp_attr_mask|qp_init_attr|mtu|port_state|port_attr|qp_state|event_type|async_event)' \
  'IBV_LINK_LAYER_.*'
declare_library ucp Ucp ucp/api/ucp.h 'ucp_get_version|ucp_get_version_string' 'ucp_nothing' 'UCP_API_M.*'
