//! Where the kernel refuses something: io_uring itself, or locked memory.

use blockplane_transfer::{DirectIo, FileEngine, OpenError, PostOptions};

use crate::support::{Blocks, WAIT, agent, arena, check, disk, open, patterned};

/// Forbids `io_uring_setup` to this thread and its children, as container runtimes do.
fn forbid_io_uring() -> std::io::Result<()> {
    let statement = |code: u32, k: u32| libc::sock_filter {
        code: code as u16,
        jt: 0,
        jf: 0,
        k,
    };
    let mut program = [
        // The number of the system call is the first word.
        statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0),
        libc::sock_filter {
            jf: 1,
            ..statement(
                libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K,
                libc::SYS_io_uring_setup as u32,
            )
        },
        statement(
            libc::BPF_RET | libc::BPF_K,
            libc::SECCOMP_RET_ERRNO | libc::EPERM as u32,
        ),
        statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ALLOW),
    ];
    let filter = libc::sock_fprog {
        len: program.len() as u16,
        filter: program.as_mut_ptr(),
    };
    // SAFETY: no pointers.
    if unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) } != 0 {
        return Err(std::io::Error::last_os_error());
    }
    // SAFETY: the program lives until the call returns, and the kernel copies it.
    let set = unsafe {
        libc::prctl(
            libc::PR_SET_SECCOMP,
            libc::SECCOMP_MODE_FILTER,
            &raw const filter,
        )
    };
    if set != 0 {
        return Err(std::io::Error::last_os_error());
    }
    Ok(())
}

#[test]
fn threads_take_over_where_io_uring_is_forbidden() {
    std::thread::spawn(|| {
        if let Err(error) = forbid_io_uring() {
            println!("skipped: no filter of system calls: {error}");
            return;
        }
        let folder = disk();
        let path = patterned(folder.path(), "forbidden", 20 * 5000, 1);
        let fallback = agent(FileEngine::Auto);
        let file = open(&fallback, &path, DirectIo::Auto);
        let reason = file.lane().reason;
        assert!(reason.contains("threads (no io_uring: "), "{reason}");
        assert!(format!("{file:?}").contains("no io_uring"), "{file:?}");
        let memory = arena(&fallback, 20 * 5000);
        let blocks = Blocks::flat(20, 5000, &[3, 1, 4, 15]);
        check(
            &fallback,
            (&memory, &blocks),
            (&path, &file, &Blocks::flat(20, 5000, &[9, 2, 6, 5])),
        );

        let strict = agent(FileEngine::Uring);
        let refused = strict
            .open_file(blockplane_transfer::FileConfig::new(&path))
            .unwrap_err();
        let OpenError::Io { what, source, .. } = &refused else {
            panic!("{refused}");
        };
        assert!(what.contains("io_uring"), "{refused}");
        assert_eq!(source.raw_os_error(), Some(libc::EPERM));
    })
    .join()
    .unwrap();
}

#[test]
fn threads_can_be_asked_for() {
    let folder = disk();
    let path = patterned(folder.path(), "asked", 4096, 1);
    let agent = agent(FileEngine::Threads);
    let reason = open(&agent, &path, DirectIo::Auto).lane().reason;
    assert!(reason.contains("threads (asked for)"), "{reason}");
}

#[test]
fn memory_that_may_not_be_locked_is_used_plainly() {
    std::thread::spawn(|| {
        let limit = rustix::process::getrlimit(rustix::process::Resource::Memlock).current;
        let mut sets = rustix::thread::capabilities(None).unwrap();
        sets.effective
            .remove(rustix::thread::CapabilitySet::IPC_LOCK);
        rustix::thread::set_capabilities(None, sets).unwrap();
        let bytes = match limit {
            Some(limit) if limit <= 64 << 20 => limit + (4 << 20),
            limit => {
                println!("skipped: {limit:?} bytes may be locked here");
                return;
            }
        };
        let folder = disk();
        let blocks = bytes / 65536;
        let path = patterned(folder.path(), "locked", bytes as usize, 1);
        let agent = agent(FileEngine::Uring);
        let file = open(&agent, &path, DirectIo::On);
        let memory = arena(&agent, bytes as usize);
        let ids: Vec<u32> = (0..blocks as u32).collect();
        let all = Blocks::flat(blocks as u32, 65536, &ids);
        check(&agent, (&memory, &all), (&path, &file, &all));
        file.sync(PostOptions::within(WAIT))
            .unwrap()
            .wait(WAIT)
            .unwrap();
    })
    .join()
    .unwrap();
}
