//! GPUs: what the driver shows, which devices reach each other, and the compiler of kernels.

use blockplane_transfer::{
    CudaDevice, CudaReport, CudaUnavailable, KernelConfig, NvrtcInfo, find_nvrtc, probe_cuda,
};

use super::{Finding, Roots, Verdict, read};

const GIB: u64 = 1 << 30;
/// Used by devices of this capability and later.
const BULK_SINCE: (u32, u32) = (9, 0);
const OLDEST: (u32, u32) = (8, 0);

/// What was found out about CUDA.
#[derive(Clone, Debug)]
pub(super) struct Cuda {
    driver: Result<CudaReport, CudaUnavailable>,
    /// The compiler, or why there is none; none where nobody has asked.
    compiler: Option<Result<NvrtcInfo, String>>,
    kernels: KernelConfig,
}

impl Cuda {
    /// Asks the driver of this process.
    pub(super) fn here() -> Self {
        let kernels = crate::kernels::config();
        let driver = probe_cuda();
        let major = driver.as_ref().ok();
        let major = major.map(|report| report.driver_version / 1000);
        let compiler = find_nvrtc(&kernels, major).map_err(|error| error.to_string());
        Self {
            driver,
            compiler: Some(compiler),
            kernels,
        }
    }

    /// A machine without any.
    #[cfg(test)]
    pub(super) fn none() -> Self {
        Self {
            driver: Err(CudaUnavailable::NoDriver),
            compiler: None,
            kernels: KernelConfig::default(),
        }
    }
}

/// One finding for the driver; with devices also one for each of them, and for what they need.
pub(super) fn findings(roots: &Roots<'_>) -> Vec<Finding> {
    match &roots.cuda.driver {
        Err(reason) => vec![absent(roots, reason)],
        Ok(report) => {
            let mut findings = vec![driver(roots, report)];
            findings.extend(report.devices.iter().map(device));
            if report.devices.len() > 1 {
                findings.push(reach(&report.devices));
            }
            findings.extend(compiler(&roots.cuda));
            findings
        }
    }
}

fn absent(roots: &Roots<'_>, reason: &CudaUnavailable) -> Finding {
    let files = device_files(roots);
    let mut found = reason.to_string();
    if files > 0 {
        found.push_str(&format!("; there are {files} device file(s) in /dev"));
    }
    if let Some(module) = module(roots) {
        found.push_str(&format!("; {module}"));
    }
    let advice = if files > 0 {
        "install the user part of the driver (libcuda.so.1) of the same version, or put its folder on \
         LD_LIBRARY_PATH"
    } else {
        "nothing for CPU serving; for GPUs install the NVIDIA driver (container: --gpus all)"
    };
    Finding {
        name: "CUDA",
        verdict: Verdict::Absent,
        found,
        used: "for KV blocks in GPU memory; everything else works without it".to_owned(),
        advice: advice.to_owned(),
    }
}

fn device_files(roots: &Roots<'_>) -> usize {
    (0..64)
        .filter(|n| roots.dev.join(format!("nvidia{n}")).exists())
        .count()
}

/// The line in which the kernel module says its version.
fn module(roots: &Roots<'_>) -> Option<String> {
    let text = read(roots.proc.join("driver/nvidia/version"))?;
    text.lines().next().map(str::to_owned)
}

fn driver(roots: &Roots<'_>, report: &CudaReport) -> Finding {
    let version = report.driver_version;
    let module = module(roots).map_or_else(String::new, |module| format!("; {module}"));
    Finding {
        name: "CUDA",
        verdict: Verdict::Ok,
        found: format!(
            "{} device(s), the driver supports CUDA {}.{}{module}",
            report.devices.len(),
            version / 1000,
            version % 1000 / 10
        ),
        used: "for KV blocks in GPU memory; `blockplane selftest gpu` checks them".to_owned(),
        advice: String::new(),
    }
}

fn device(device: &CudaDevice) -> Finding {
    let CudaDevice {
        ordinal,
        name,
        capability,
        multiprocessors,
        memory_bytes,
        pci,
        numa_node,
        ..
    } = device;
    let (major, minor) = capability;
    let node = numa_node.map_or_else(|| "unknown".to_owned(), |node| node.to_string());
    let (verdict, used, advice) = if *capability < OLDEST {
        (
            Verdict::Absent,
            "not at all: the kernels need compute capability 8.0".to_owned(),
            "use a GPU of the Ampere generation or later".to_owned(),
        )
    } else if *capability < BULK_SINCE {
        let used = "copies by loads and stores; bulk copies need compute capability 9.0";
        (Verdict::Ok, used.to_owned(), String::new())
    } else {
        (
            Verdict::Ok,
            "copies by bulk copies".to_owned(),
            String::new(),
        )
    };
    Finding {
        name: "GPU",
        verdict,
        found: format!(
            "cuda:{ordinal} {name}, compute capability {major}.{minor}, {} GiB, {multiprocessors} SMs, \
             PCI {pci}, NUMA node {node}",
            memory_bytes / GIB
        ),
        used,
        advice,
    }
}

/// Which devices reach each other.
fn reach(devices: &[CudaDevice]) -> Finding {
    let all = devices.len() - 1;
    let reached = |device: &CudaDevice| device.peers.len();
    if devices.iter().all(|device| reached(device) == all) {
        return Finding {
            name: "GPU to GPU",
            verdict: Verdict::Ok,
            found: "every device reaches every other one".to_owned(),
            used: "blocks move between GPUs directly".to_owned(),
            advice: String::new(),
        };
    }
    let lines: Vec<_> = devices
        .iter()
        .map(|device| {
            let peers: Vec<_> = device
                .peers
                .iter()
                .map(|peer| format!("cuda:{peer}"))
                .collect();
            let peers = if peers.is_empty() {
                "no other".to_owned()
            } else {
                peers.join(", ")
            };
            format!("cuda:{} reaches {peers}", device.ordinal)
        })
        .collect();
    Finding {
        name: "GPU to GPU",
        verdict: Verdict::Limited,
        found: lines.join("; "),
        used: "blocks move directly only between devices that reach each other".to_owned(),
        advice: "peer access needs NVLink, or PCIe without an IOMMU or access control in between \
                 (nvidia-smi topo -p2p r shows it)"
            .to_owned(),
    }
}

fn compiler(cuda: &Cuda) -> Option<Finding> {
    let kept = match &cuda.kernels.cache_folder {
        Some(folder) => format!("kept in {}", folder.display()),
        None => "not kept: neither XDG_CACHE_HOME nor HOME is set".to_owned(),
    };
    let used = format!("compiles the copy kernels once per kind of GPU; {kept}");
    Some(match cuda.compiler.as_ref()? {
        Ok(nvrtc) => Finding {
            name: "NVRTC",
            verdict: Verdict::Ok,
            found: format!(
                "{}.{}, {}",
                nvrtc.version.0,
                nvrtc.version.1,
                nvrtc.path.display()
            ),
            used,
            advice: String::new(),
        },
        Err(reason) => Finding {
            name: "NVRTC",
            verdict: Verdict::Limited,
            found: reason.clone(),
            used: format!("{used}; without it nothing moves into or out of GPU memory"),
            advice: "install the CUDA toolkit or `pip install nvidia-cuda-nvrtc`, and set CUDA_HOME, or \
                     VIRTUAL_ENV to the Python environment"
                .to_owned(),
        },
    })
}
