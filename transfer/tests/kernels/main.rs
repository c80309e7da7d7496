//! The CUDA kernels compile for every architecture, with the real compiler and without a GPU.
//!
//! The compiler is found below the folder that `BLOCKPLANE_NVRTC_DIR` names: the `site-packages` of a
//! Python environment with `nvidia-cuda-nvrtc`. `tests/run` makes one, and counts these tests as
//! skipped where it cannot; run by hand without the variable they say so and do nothing.

#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::disallowed_methods,
    reason = "a failed unwrap is a failed test, reasons are printed, and a test has its environment only"
)]

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use blockplane_transfer::{
    ImageOrigin, KernelConfig, KernelError, KernelImage, compile_kernels, find_nvrtc,
};

/// Of every device that the kernels have code of their own for.
const CAPABILITIES: [(u32, u32); 3] = [(8, 0), (9, 0), (10, 0)];
const FOLDER: &str = "BLOCKPLANE_NVRTC_DIR";
/// For the process that other tests start.
const CACHE: &str = "BLOCKPLANE_TEST_CACHE";

/// A configuration with the compiler of the test run, or none.
fn config() -> Option<KernelConfig> {
    let Some(folder) = std::env::var_os(FOLDER) else {
        println!("skipped: {FOLDER} names no folder with NVRTC");
        return None;
    };
    let mut config = KernelConfig::default();
    config.nvrtc_folders = vec![folder.into()];
    Some(config)
}

fn contains(image: &KernelImage, text: &str) -> bool {
    let text = text.as_bytes();
    image.bytes.windows(text.len()).any(|part| part == text)
}

#[test]
fn every_kernel_compiles_for_every_architecture() {
    let Some(config) = config() else { return };
    let images = compile_kernels(&config, &CAPABILITIES).unwrap();
    for (image, (major, minor)) in images.iter().zip(CAPABILITIES) {
        assert_eq!(image.output, format!("sm_{major}{minor}"));
        assert_eq!(&image.bytes[..4], b"\x7fELF", "{image:?}");
        for kernel in ["bp_copy_lanes", "bp_copy_small", "bp_permute"] {
            assert!(contains(image, kernel), "{kernel}: {image:?}");
        }
        // Bulk copies exist from 9.0 on.
        assert_eq!(contains(image, "bp_copy_bulk"), major >= 9, "{image:?}");
    }
    // A second GPU of a kind costs nothing.
    let again = compile_kernels(&config, &CAPABILITIES[1..2]).unwrap();
    assert_eq!(again[0].origin, ImageOrigin::InMemory);
    assert_eq!(again[0].bytes, images[1].bytes);
}

#[test]
fn an_unknown_newer_device_gets_portable_code() {
    let Some(config) = config() else { return };
    let newest = *find_nvrtc(&config, None)
        .unwrap()
        .architectures
        .last()
        .unwrap();
    let image = &compile_kernels(&config, &[(99, 0)]).unwrap()[0];
    assert_eq!(image.output, format!("compute_{newest}"));
    assert!(contains(image, ".entry bp_copy_bulk"));
    assert_eq!(
        image.bytes.last(),
        Some(&0),
        "text for the driver ends with NUL"
    );
}

#[test]
fn options_reach_the_compiler() {
    let Some(mut config) = config() else { return };
    let plain = compile_kernels(&config, &CAPABILITIES[1..2]).unwrap();
    config.options = vec!["-lineinfo".into()];
    let lines = compile_kernels(&config, &CAPABILITIES[1..2]).unwrap();
    assert!(!contains(&plain[0], ".debug_line") && contains(&lines[0], ".debug_line"));
}

#[test]
fn a_broken_kernel_is_an_error_with_the_compilers_words() {
    let Some(mut config) = config() else { return };
    config.options = vec!["-Dlayer_major=0".into()];
    let error = compile_kernels(&config, &CAPABILITIES[1..2]).unwrap_err();
    let KernelError::Compile { output, log, .. } = &error else {
        panic!("{error:?}")
    };
    assert_eq!(output, "sm_90");
    assert!(log.contains("abi.cuh(") && log.contains("error"), "{log}");
    assert!(error.to_string().contains(log.as_str()));

    config.options = vec!["--no-such-option".into()];
    let error = compile_kernels(&config, &CAPABILITIES[1..2]).unwrap_err();
    assert!(matches!(error, KernelError::Nvrtc { .. }), "{error:?}");
    assert!(error.to_string().contains("--no-such-option"), "{error}");

    config.options = vec!["-DX=\0".into()];
    let error = compile_kernels(&config, &CAPABILITIES[1..2]).unwrap_err();
    assert!(matches!(error, KernelError::Nul { .. }), "{error:?}");
}

#[test]
fn a_slow_compiler_is_not_waited_for() {
    let Some(mut config) = config() else { return };
    config.compile_timeout = Duration::from_millis(1);
    config.options = vec!["-DSLOW".into()];
    let error = compile_kernels(&config, &CAPABILITIES[..1]).unwrap_err();
    assert!(matches!(error, KernelError::TooSlow { .. }), "{error:?}");
}

#[test]
fn a_compiler_newer_than_the_driver_is_passed_over() {
    let Some(config) = config() else { return };
    let found = find_nvrtc(&config, None).unwrap();
    assert!(
        found.path.starts_with(&config.nvrtc_folders[0]),
        "{found:?}"
    );
    assert_eq!(found, find_nvrtc(&config, Some(found.version.0)).unwrap());
    // There is no version 11 that could be used in its place.
    let error = find_nvrtc(&config, Some(11)).unwrap_err();
    let said = error.to_string();
    assert!(said.contains("newer than the driver"), "{said}");
    assert!(said.contains("pip install nvidia-cuda-nvrtc"), "{said}");
}

/// A process of its own, because this one remembers what it has compiled.
fn other_process(cache: &Path) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", "compiling_process", "--nocapture"])
        .env(CACHE, cache)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap()
}

fn origin(child: Child) -> String {
    let output = child.wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{text}");
    let line = text.lines().find_map(|line| line.split("origin: ").nth(1));
    line.unwrap_or_else(|| panic!("{text}")).to_owned()
}

#[test]
#[ignore = "started by processes_share_what_one_of_them_compiled"]
fn compiling_process() {
    let mut config = config().unwrap();
    config.cache_folder = std::env::var_os(CACHE).map(PathBuf::from);
    let image = &compile_kernels(&config, &[(9, 0)]).unwrap()[0];
    assert!(contains(image, "bp_copy_bulk"));
    println!("origin: {}", image.origin);
}

#[test]
fn processes_share_what_one_of_them_compiled() {
    let Some(_) = config() else { return };
    let folder = tempfile::tempdir().unwrap();
    // Two at a time, into a folder that is not there yet.
    let cache = folder.path().join("kernels");
    let pair = [other_process(&cache), other_process(&cache)];
    for child in pair {
        origin(child);
    }
    let files = || -> Vec<PathBuf> {
        let entries = std::fs::read_dir(&cache).unwrap();
        entries.map(|entry| entry.unwrap().path()).collect()
    };
    let [file] = &files()[..] else {
        panic!("{:?}", files())
    };
    let from_file = format!("from {}", file.display());
    assert_eq!(origin(other_process(&cache)), from_file);

    // A torn file is compiled again and replaced.
    let whole = std::fs::read(file).unwrap();
    std::fs::write(file, &whole[..whole.len() / 2]).unwrap();
    let torn = origin(other_process(&cache));
    assert!(torn.starts_with("compiled in"), "{torn}");
    assert_eq!(std::fs::read(file).unwrap().len(), whole.len());
    assert_eq!(origin(other_process(&cache)), from_file);

    // A folder that cannot be used costs the cache and not the kernels.
    let blocked = folder.path().join("blocked");
    std::fs::write(&blocked, "a file").unwrap();
    let without = origin(other_process(&blocked));
    assert!(without.starts_with("compiled in"), "{without}");
}
