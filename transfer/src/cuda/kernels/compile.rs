//! From the kernels' sources to an image for one device: which code, which options, how long.

use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::thread;
use std::time::Duration;

use super::cache::Key;
use super::nvrtc::{Nvrtc, Output, Source};
use super::{CAPABILITY_MIN, KernelError};

/// The program: both kernel files.
pub(super) const SOURCE: Source<'static> = Source {
    main: "#include \"copy.cu\"\n#include \"permute.cu\"\n",
    headers: &[
        ("abi.cuh", include_str!("abi.cuh")),
        ("access.cuh", include_str!("access.cuh")),
        ("copy.cu", include_str!("copy.cu")),
        ("done.cuh", include_str!("done.cuh")),
        ("permute.cu", include_str!("permute.cu")),
        ("walk.cuh", include_str!("walk.cuh")),
    ],
};

/// What to make for a device: machine code where the compiler knows the device, otherwise portable
/// code for the newest architecture that the device understands and the compiler knows.
pub(super) fn output(
    capability: (u32, u32),
    known: &[u32],
    nvrtc: impl Fn() -> super::NvrtcInfo,
) -> Result<Output, KernelError> {
    if capability < CAPABILITY_MIN {
        return Err(KernelError::TooOld { capability });
    }
    let number = capability.0.saturating_mul(10).saturating_add(capability.1);
    if known.contains(&number) {
        return Ok(Output::Cubin(number));
    }
    let oldest = CAPABILITY_MIN.0 * 10 + CAPABILITY_MIN.1;
    known
        .iter()
        .copied()
        .filter(|known| (oldest..number).contains(known))
        .max()
        .map(Output::Ptx)
        .ok_or_else(|| KernelError::UnknownArchitecture {
            capability,
            nvrtc: nvrtc(),
        })
}

/// All options: ours, then the caller's.
pub(super) fn options(output: Output, extra: &[String]) -> Vec<String> {
    let mut options = vec![
        format!("--gpu-architecture={output}"),
        "--std=c++17".to_owned(),
    ];
    options.extend(extra.iter().cloned());
    options
}

/// Stands for everything that the image is made from.
pub(super) fn key(source: Source<'_>, options: &[String], version: (u32, u32)) -> Key {
    let (major, minor) = (version.0.to_le_bytes(), version.1.to_le_bytes());
    let mut parts: Vec<&[u8]> = vec![&major, &minor, source.main.as_bytes()];
    for (name, body) in source.headers {
        parts.extend([name.as_bytes(), body.as_bytes()]);
    }
    parts.extend(options.iter().map(String::as_bytes));
    Key::of(parts)
}

/// Compiles in a thread of its own, so that a compiler that hangs costs `limit` and no more of the
/// caller's time. The thread cannot be stopped; it ends with the compiler.
pub(super) fn compile(
    nvrtc: &Arc<Nvrtc>,
    output: Output,
    options: Vec<String>,
    limit: Duration,
) -> Result<Vec<u8>, KernelError> {
    let (sender, receiver) = sync_channel(1);
    let own = Arc::clone(nvrtc);
    let work = move || {
        // Nobody listens any more when the limit is over.
        drop(sender.send(own.compile(SOURCE, output, &options)));
    };
    thread::Builder::new()
        .name("bp-nvrtc".to_owned())
        .spawn(work)
        .map_err(|source| KernelError::Thread { source })?;
    match receiver.recv_timeout(limit) {
        Ok(result) => result,
        Err(RecvTimeoutError::Timeout) => Err(KernelError::TooSlow {
            output: output.to_string(),
            limit,
        }),
        Err(RecvTimeoutError::Disconnected) => Err(KernelError::Crashed {
            output: output.to_string(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::super::NvrtcInfo;
    use super::*;

    fn info() -> NvrtcInfo {
        NvrtcInfo {
            path: "/nowhere/libnvrtc.so.13".into(),
            version: (13, 0),
            architectures: vec![],
        }
    }

    #[test]
    fn the_devices_own_code_or_the_newest_that_it_understands() {
        let known = [75, 80, 86, 89, 90, 100, 120];
        let of = |capability| output(capability, &known, info);
        assert_eq!(of((9, 0)).unwrap(), Output::Cubin(90));
        assert_eq!(of((10, 0)).unwrap(), Output::Cubin(100));
        assert_eq!(of((8, 0)).unwrap(), Output::Cubin(80));
        // Not known: the next lower one, as portable code.
        assert_eq!(of((10, 3)).unwrap(), Output::Ptx(100));
        assert_eq!(of((8, 7)).unwrap(), Output::Ptx(86));
        assert_eq!(of((13, 0)).unwrap(), Output::Ptx(120));
        assert_eq!(of((u32::MAX, 9)).unwrap(), Output::Ptx(120));
        let old = of((7, 5)).unwrap_err();
        assert!(old.to_string().contains("7.5"), "{old}");
        let unknown = output((9, 0), &[70, 75], info).unwrap_err();
        assert!(
            unknown.to_string().contains("/nowhere/libnvrtc.so.13"),
            "{unknown}"
        );
    }

    #[test]
    fn a_key_stands_for_all_that_an_image_is_made_from() {
        let sm_90 = options(Output::Cubin(90), &[]);
        let one = key(SOURCE, &sm_90, (13, 0));
        assert_eq!(one, key(SOURCE, &sm_90, (13, 0)));
        let mut others = vec![
            key(SOURCE, &options(Output::Cubin(100), &[]), (13, 0)),
            key(SOURCE, &options(Output::Ptx(90), &[]), (13, 0)),
            key(
                SOURCE,
                &options(Output::Cubin(90), &["-lineinfo".to_owned()]),
                (13, 0),
            ),
            key(SOURCE, &sm_90, (13, 1)),
            key(SOURCE, &sm_90, (12, 0)),
        ];
        let main = Source { main: "", ..SOURCE };
        let headers = Source {
            headers: &SOURCE.headers[1..],
            ..SOURCE
        };
        others.extend([key(main, &sm_90, (13, 0)), key(headers, &sm_90, (13, 0))]);
        assert!(!others.contains(&one));
        others.sort_unstable();
        others.dedup();
        assert_eq!(others.len(), 7);
    }

    #[test]
    fn every_file_that_is_included_is_given_to_the_compiler() {
        let names: Vec<_> = SOURCE.headers.iter().map(|(name, _)| *name).collect();
        let texts = SOURCE
            .headers
            .iter()
            .map(|(_, body)| *body)
            .chain([SOURCE.main]);
        for line in texts.flat_map(str::lines) {
            if let Some(included) = line.strip_prefix("#include ") {
                assert!(names.contains(&included.trim_matches('"')), "{line}");
            }
        }
    }
}
