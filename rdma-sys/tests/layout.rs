//! Sizes and offsets of the bindings against what the C compiler says about the headers.

use std::fmt::Write as _;
use std::mem::{offset_of, size_of};
use std::process::Command;

use blockplane_rdma_sys::verbs::*;

macro_rules! layouts {
    ($($name:ident { $($field:ident),* $(,)? })*) => {
        /// Name of the size or offset in C, and its value here.
        fn layouts() -> Vec<(String, usize)> {
            let mut all = Vec::new();
            $(
                all.push((format!("sizeof(struct {})", stringify!($name)), size_of::<$name>()));
                $(all.push((
                    format!("offsetof(struct {}, {})", stringify!($name), c_name(stringify!($field))),
                    offset_of!($name, $field),
                ));)*
            )*
            all
        }
    };
}

macro_rules! constants {
    ($($name:ident),* $(,)?) => {
        fn constants() -> Vec<(String, usize)> {
            vec![$((stringify!($name).to_owned(), $name as usize)),*]
        }
    };
}

/// Words that Rust keeps for itself have an underscore in the bindings.
fn c_name(field: &str) -> &str {
    field.trim_end_matches('_')
}

layouts! {
    ibv_device {}
    ibv_context { device, ops, cmd_fd, async_fd, num_comp_vectors }
    ibv_context_ops { poll_cq, req_notify_cq, post_send, post_recv, alloc_mw }
    ibv_device_attr { fw_ver, max_qp, max_qp_wr, max_sge, max_mr, max_qp_rd_atom, max_qp_init_rd_atom, phys_port_cnt }
    ibv_port_attr { state, max_mtu, active_mtu, gid_tbl_len, max_msg_sz, lid, link_layer, flags }
    ibv_pd { context, handle }
    ibv_mr { context, pd, addr, length, handle, lkey, rkey }
    ibv_comp_channel { context, fd, refcnt }
    ibv_cq { context, channel, cq_context, handle, cqe }
    ibv_qp { context, qp_context, pd, send_cq, handle, qp_num, state, qp_type }
    ibv_qp_cap { max_send_wr, max_recv_wr, max_send_sge, max_recv_sge, max_inline_data }
    ibv_qp_init_attr { qp_context, send_cq, recv_cq, srq, cap, qp_type, sq_sig_all }
    ibv_qp_attr {
        qp_state, path_mtu, rq_psn, sq_psn, dest_qp_num, qp_access_flags, cap, ah_attr, pkey_index,
        max_rd_atomic, max_dest_rd_atomic, min_rnr_timer, port_num, timeout, retry_cnt, rnr_retry,
    }
    ibv_ah_attr { grh, dlid, sl, is_global, port_num }
    ibv_global_route { dgid, flow_label, sgid_index, hop_limit, traffic_class }
    ibv_sge { addr, length, lkey }
    ibv_send_wr { wr_id, next, sg_list, num_sge, opcode, send_flags, wr, qp_type }
    ibv_recv_wr { wr_id, next, sg_list, num_sge }
    ibv_wc { wr_id, status, opcode, vendor_err, byte_len, qp_num, src_qp, wc_flags, slid }
    ibv_async_event { element, event_type }
}

constants! {
    IBV_WC_SUCCESS, IBV_WC_WR_FLUSH_ERR, IBV_WC_REM_ACCESS_ERR, IBV_WC_RETRY_EXC_ERR,
    IBV_WR_RDMA_WRITE, IBV_WR_RDMA_WRITE_WITH_IMM, IBV_WR_RDMA_READ, IBV_SEND_SIGNALED, IBV_SEND_FENCE,
    IBV_SEND_INLINE, IBV_QPT_RC, IBV_QPS_RESET, IBV_QPS_INIT, IBV_QPS_RTR, IBV_QPS_RTS, IBV_QPS_ERR,
    IBV_ACCESS_LOCAL_WRITE, IBV_ACCESS_REMOTE_WRITE, IBV_ACCESS_REMOTE_READ, IBV_QP_STATE, IBV_QP_AV,
    IBV_QP_RQ_PSN, IBV_QP_SQ_PSN, IBV_QP_DEST_QPN, IBV_QP_MAX_DEST_RD_ATOMIC, IBV_PORT_ACTIVE,
    IBV_LINK_LAYER_ETHERNET, IBV_MTU_4096, IBV_EVENT_DEVICE_FATAL, IBV_EVENT_PORT_ERR,
}

#[expect(
    clippy::disallowed_methods,
    reason = "a test executable is configured by its environment only"
)]
#[test]
#[ignore = "needs a C compiler and the headers of rdma-core: tests/run rdma"]
fn bindings_are_laid_out_as_the_compiler_lays_out_the_headers() {
    let include = std::env::var("BLOCKPLANE_RDMA_HEADERS").expect("set by tests/run");
    let ours = [layouts(), constants()].concat();
    let mut source =
        "#include <infiniband/verbs.h>\n#include <stddef.h>\n#include <stdio.h>\nint main(void) {\n"
            .to_owned();
    for (what, _) in &ours {
        writeln!(source, "  printf(\"%zu\\n\", (size_t)({what}));").unwrap();
    }
    source.push_str("  return 0;\n}\n");
    let folder = std::env::temp_dir().join(format!("blockplane-layout-{}", std::process::id()));
    std::fs::create_dir(&folder).unwrap();
    let (text, program) = (folder.join("layout.c"), folder.join("layout"));
    std::fs::write(&text, source).unwrap();
    let mut compile = Command::new("cc");
    compile
        .arg("-I")
        .arg(include)
        .arg("-o")
        .args([&program, &text]);
    assert!(compile.status().unwrap().success());
    let printed = Command::new(&program).output().unwrap().stdout;
    std::fs::remove_dir_all(&folder).unwrap();
    let theirs = String::from_utf8(printed).unwrap();
    let theirs: Vec<usize> = theirs.lines().map(|line| line.parse().unwrap()).collect();
    assert_eq!(theirs.len(), ours.len());
    let wrong: Vec<_> = ours
        .iter()
        .zip(theirs)
        .filter(|(ours, theirs)| ours.1 != *theirs)
        .collect();
    assert!(wrong.is_empty(), "here and in C: {wrong:?}");
}
