//! A worker whose disk fails it while it serves: full, without calls that others have, read-only, and a
//! file that is cut or removed. The tier says so once, answers stay the same, and the next worker finds
//! the disk as it is then.
//!
//! Most of the disks are made here, which takes root; without it the tests say so and check nothing.

use std::{
    fs, io,
    net::Ipv4Addr,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};
use blockplane_tests::{
    Client, ClusterBuilder, client::Completion, cluster::free_port, health, traffic::LIMIT, wait,
};

use crate::tiers::{CACHED_TOKENS, Scene, sample, store_file};

/// Blocks of a prompt that go to the disk.
const BLOCKS: u32 = 25;
/// Blocks of G3, if the disk has room for them.
const CAPACITY: u32 = 600;

/// Where a file system is mounted, until it is not any more.
struct Mounted(Option<PathBuf>);

impl Mounted {
    /// Of this type, without a device: `tmpfs` or `ramfs`.
    fn memory(kind: &str, folder: &Path) -> Option<Self> {
        run(&["mount", "-t", kind, kind, folder.to_str()?])?;
        Some(Self(Some(folder.to_owned())))
    }

    /// Of this type, in a new file.
    fn image(kind: &str, file: &Path, folder: &Path) -> Option<Self> {
        fs::File::create(file).ok()?.set_len(64 << 20).ok()?;
        run(&[&format!("mkfs.{kind}"), "-q", file.to_str()?])?;
        Self::of(file, folder)
    }

    /// What is in this file.
    fn of(file: &Path, folder: &Path) -> Option<Self> {
        run(&["mount", "-o", "loop", file.to_str()?, folder.to_str()?])?;
        Some(Self(Some(folder.to_owned())))
    }
}

impl Mounted {
    /// Ends it, as soon as nobody uses it any more.
    fn unmount(mut self) -> Result<()> {
        let folder = self.0.take().context("it is mounted")?;
        wait::until(
            "the file system to be free",
            LIMIT,
            || match Command::new("umount").arg(&folder).output() {
                Ok(output) if output.status.success() => Ok(()),
                other => Err(format!("{other:?}")),
            },
        )
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let Some(folder) = &self.0 else {
            return;
        };
        // Lazily: after a failure the worker may still have its file open.
        let done = Command::new("umount").arg("-l").arg(folder).status();
        if !done.is_ok_and(|status| status.success()) {
            eprintln!("{} is still mounted", folder.display());
        }
    }
}

/// None, and a line that says why, when the command fails.
fn run(words: &[&str]) -> Option<()> {
    let why = match Command::new(words[0]).args(&words[1..]).output() {
        Ok(output) if output.status.success() => return Some(()),
        Ok(output) => String::from_utf8_lossy(&output.stderr).trim().to_owned(),
        Err(error) => error.to_string(),
    };
    eprintln!("skipped: {}: {why}", words.join(" "));
    None
}

/// A folder for a disk, and beside it the place of its image.
fn places() -> Result<(tempfile::TempDir, PathBuf, PathBuf)> {
    let folder = tempfile::tempdir()?;
    let (disk, image) = (folder.path().join("disk"), folder.path().join("image"));
    fs::create_dir(&disk)?;
    Ok((folder, disk, image))
}

/// A worker, its metrics, and prompts with their answers.
struct Watched {
    scene: Scene,
    metrics: Client,
    known: Vec<(Vec<u64>, Completion)>,
}

impl Watched {
    /// A worker with 60 blocks of host memory, and two prompts that are on the disk.
    fn new(disk: &Path) -> Result<Self> {
        let port = free_port()?;
        let builder = ClusterBuilder::new()
            .variable("DYN_KVBM_METRICS", &true)
            .variable("DYN_KVBM_METRICS_PORT", &port);
        let scene = Scene::with(builder, disk, 60, CAPACITY)?;
        let metrics = Client::new((Ipv4Addr::LOCALHOST, port).into());
        let known = Vec::new();
        let mut watched = Self {
            scene,
            metrics,
            known,
        };
        for prompts in 1..=2 {
            let prompt = watched.scene.prompt();
            let (first, _) = watched.scene.ask(&prompt)?;
            watched.known.push((prompt, first));
            let written = f64::from(prompts * BLOCKS);
            watched.wait_metric("kvbm_offload_blocks_h2d", |blocks| blocks >= written)?;
        }
        Ok(watched)
    }

    fn metric(&self, name: &str) -> Result<f64> {
        Ok(sample(&self.metrics.get("/metrics", LIMIT)?.body, name))
    }

    fn wait_metric(&self, name: &str, holds: impl Fn(f64) -> bool) -> Result<()> {
        wait::until(name, LIMIT, || match self.metric(name) {
            Ok(value) if holds(value) => Ok(()),
            other => Err(format!("{other:?}")),
        })
    }

    /// Waits for a state of G3.
    fn wait_state(&self, state: &str) -> Result<()> {
        let name = format!("kvbm_tier_state{{tier=\"disk\",state=\"{state}\"}}");
        self.wait_metric(&name, |is| is == 1.0)
    }

    /// G3 changed its state once, and its log says so in one line, to which `why` belongs.
    fn told_once(&self, why: &str) -> Result<()> {
        let changes = self.metric("kvbm_tier_state_changes_total")?;
        ensure!(changes == 1.0, "G3 changed its state {changes} times");
        let lines = self.logged("tier changed its state");
        ensure!(
            lines.len() == 1 && lines[0].contains(why),
            "{why}: {lines:?}"
        );
        Ok(())
    }

    /// Lines of the log of any worker with this text.
    fn logged(&self, text: &str) -> Vec<String> {
        let logs = self.scene.cluster.logs();
        let lines = logs.iter().flat_map(|(_, log)| log.lines());
        lines
            .filter(|line| line.contains(text))
            .map(str::to_owned)
            .collect()
    }

    /// Asks other prompts until nothing of the known ones is in memory.
    fn push_out(&mut self) -> Result<()> {
        for _ in 0..6 {
            let other = self.scene.prompt();
            self.scene.ask(&other)?;
        }
        Ok(())
    }

    /// The known prompts have the same answers as before, wherever their blocks are.
    fn same_answers(&self) -> Result<()> {
        for (prompt, first) in &self.known {
            let (again, _) = self.scene.ask(prompt)?;
            ensure!(again == *first, "{again:?} is not {first:?}");
        }
        Ok(())
    }

    /// The same from the disk.
    fn come_back(&mut self) -> Result<()> {
        self.push_out()?;
        for (prompt, first) in &self.known {
            let (again, cached) = self.scene.ask(prompt)?;
            ensure!(again == *first, "{again:?} is not {first:?}");
            ensure!(cached == CACHED_TOKENS, "{cached} tokens were cached");
        }
        Ok(())
    }

    /// The worker is killed, `between` is done, and the next one has a whole disk and uses it.
    fn works_again(&mut self, between: impl FnOnce() -> Result<()>) -> Result<()> {
        self.scene.crash(between)?;
        let slots = self.metric("kvbm_blocks_capacity{tier=\"disk\"}")?;
        ensure!(slots == f64::from(CAPACITY), "{slots} slots");
        self.wait_state("on")?;
        for prompts in 1..=2 {
            let prompt = self.scene.prompt();
            let (first, _) = self.scene.ask(&prompt)?;
            self.known.push((prompt, first));
            let written = f64::from(prompts * BLOCKS);
            self.wait_metric("kvbm_offload_blocks_h2d", |blocks| blocks >= written)?;
        }
        // Those of the first worker may be gone with its file.
        self.same_answers()?;
        self.known.drain(..2);
        self.come_back()
    }

    fn end(self) -> Result<()> {
        health::wait_idle(&self.scene.client, LIMIT)?;
        self.scene.cluster.stop()
    }
}

/// A file system that cannot allocate without writing, and one that has no way around the page cache
/// either.
#[test]
fn file_systems_that_lack_calls_are_used_as_they_are() -> Result<()> {
    for (kind, buffered) in [("ext2", 0), ("ramfs", 1)] {
        let (_folder, disk, image) = places()?;
        let made = match kind {
            "ramfs" => Mounted::memory(kind, &disk),
            _ => Mounted::image(kind, &image, &disk),
        };
        let Some(_mounted) = made else {
            continue;
        };
        let mut watched = Watched::new(&disk)?;
        watched.come_back()?;
        let lines = watched.logged("cannot allocate space");
        ensure!(lines.len() == 1, "{kind}: {lines:?}");
        let lines = watched.logged("goes through the page cache");
        ensure!(lines.len() == buffered, "{kind}: {lines:?}");
        watched.wait_state("on")?;
        watched.end()?;
    }
    Ok(())
}

/// A file that could not be allocated finds the disk full later.
#[test]
fn a_disk_that_fills_up_takes_the_slots_that_were_never_written() -> Result<()> {
    let (_folder, disk, image) = places()?;
    let Some(_mounted) = Mounted::image("ext2", &image, &disk) else {
        return Ok(());
    };
    let mut watched = Watched::new(&disk)?;
    let filler = disk.join("filler");
    let full =
        fs::File::create(&filler).and_then(|mut file| io::copy(&mut io::repeat(1), &mut file));
    ensure!(full.is_err(), "the disk has no end");
    watched.push_out()?;
    watched.wait_state("shrunk")?;
    watched.wait_metric("kvbm_disk_bad_blocks", |blocks| blocks > 0.0)?;
    watched.told_once("Shrunk")?;
    // What was written before is still there.
    watched.come_back()?;
    watched.told_once("Shrunk")?;
    watched.works_again(|| Ok(fs::remove_file(&filler)?))?;
    watched.end()
}

/// As after an error of the device, with files open for writing.
#[test]
fn a_disk_that_becomes_read_only_is_read() -> Result<()> {
    let (_folder, disk, image) = places()?;
    let Some(mounted) = Mounted::image("ext4", &image, &disk) else {
        return Ok(());
    };
    let mut watched = Watched::new(&disk)?;
    let path = disk.to_str().context("a path")?;
    if run(&["mount", "-o", "remount,abort", path]).is_none() {
        return watched.end();
    }
    watched.push_out()?;
    watched.wait_state("read_only")?;
    watched.told_once("ReadOnly")?;
    watched.come_back()?;
    watched.told_once("ReadOnly")?;
    let mut again = None;
    watched.works_again(|| {
        mounted.unmount()?;
        again = Mounted::of(&image, &disk);
        again.as_ref().context("it was mounted before")?;
        Ok(())
    })?;
    watched.end()
}

#[test]
fn a_file_that_is_cut_turns_the_tier_off() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let mut watched = Watched::new(folder.path())?;
    let file = fs::File::options()
        .write(true)
        .open(store_file(folder.path())?)?;
    file.set_len(300_000)?;
    watched.push_out()?;
    watched.wait_state("off")?;
    watched.same_answers()?;
    watched.told_once("its file was cut to 300000")?;
    watched.works_again(|| Ok(()))?;
    watched.end()
}

#[test]
fn a_file_that_is_removed_is_used_to_the_end_of_the_worker() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let mut watched = Watched::new(folder.path())?;
    fs::remove_file(store_file(folder.path())?)?;
    watched.push_out()?;
    watched.wait_state("read_only")?;
    watched.come_back()?;
    watched.told_once("its file was removed")?;
    watched.works_again(|| Ok(()))?;
    watched.end()
}
