//! The hub and its cache, by the `hf-hub` crate, with what that leaves open: checksums, a bound on
//! silence, and going on with what is cached when the hub is out of reach.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, anyhow, bail, ensure};
use hf_hub::{
    Cache, Repo, RepoType,
    api::sync::{Api, ApiBuilder, ApiError, ApiRepo},
};

use super::{files, progress::Shown, verify};
use crate::{cli::HubArgs, output};

/// Longest time without a byte.
const SILENCE: Duration = Duration::from_secs(60);
/// Tries of one request or file, with pauses between them.
const RETRIES: usize = 3;
/// Longest wait for another process that downloads the same file.
const OTHER_PROCESS: Duration = Duration::from_secs(3600);

/// One model of the hub.
pub(super) struct Hub {
    id: String,
    revision: String,
    endpoint: String,
    offline: bool,
    cache: Cache,
    api: Api,
}

impl Hub {
    pub(super) fn open(id: &str, args: &HubArgs) -> anyhow::Result<Self> {
        let home = match &args.hf_home {
            Some(home) => home.clone(),
            None => std::env::home_dir()
                .context("the home directory is not known; give --hf-home")?
                .join(".cache/huggingface"),
        };
        let dir = args
            .hf_hub_cache
            .clone()
            .unwrap_or_else(|| home.join("hub"));
        // A variable that is set to nothing says nothing.
        let some = |token: &str| Some(token.trim().to_owned()).filter(|token| !token.is_empty());
        let token = args.hf_token.as_deref().and_then(some).or_else(|| {
            let token = fs::read_to_string(home.join("token")).ok()?;
            some(&token)
        });
        let endpoint = args.hf_endpoint.trim_end_matches('/').to_owned();
        let cache = Cache::new(dir);
        let api = ApiBuilder::from_cache(cache.clone())
            .with_endpoint(endpoint.clone())
            .with_token(token)
            .with_retries(RETRIES)
            .with_user_agent("blockplane", env!("CARGO_PKG_VERSION"))
            .build()
            .map_err(|error| anyhow!("the hub's client cannot be made: {error}"))?;
        Ok(Self {
            id: id.to_owned(),
            revision: args.revision.clone(),
            endpoint,
            offline: args.hf_hub_offline,
            cache,
            api,
        })
    }

    /// The folder with the model's files, downloaded if they are not all there.
    pub(super) fn model(&self) -> anyhow::Result<PathBuf> {
        if self.offline {
            return self.cached().with_context(|| {
                format!(
                    "{} is not complete in the cache, and HF_HUB_OFFLINE forbids to ask for it",
                    self.id
                )
            });
        }
        match self.info() {
            Ok((commit, all)) => self.download(&commit, &files::wanted(&self.id, &all)?),
            Err(Unreachable {
                refused: true,
                error,
            }) => Err(error),
            Err(Unreachable { error, .. }) => match self.cached() {
                Ok(dir) => {
                    output::diagnostic(&format!(
                        "{error:#}; going on with what is cached in {}",
                        dir.display()
                    ));
                    Ok(dir)
                }
                Err(_) => Err(error),
            },
        }
    }

    /// The complete snapshot that the cache has for the revision.
    fn cached(&self) -> anyhow::Result<PathBuf> {
        let repo = self.cache.repo(self.repo(&self.revision));
        let by_name = repo.get("config.json");
        // A revision may be a commit, which needs no name.
        let config = by_name.or_else(|| {
            let path = repo.pointer_path(&self.revision).join("config.json");
            path.exists().then_some(path)
        });
        let dir = config.as_deref().and_then(Path::parent).with_context(|| {
            format!(
                "revision {} of {} is not in {}",
                self.revision,
                self.id,
                self.cache.path().display()
            )
        })?;
        files::check_complete(dir).with_context(|| format!("{}", dir.display()))?;
        Ok(dir.to_owned())
    }

    /// The commit of the revision, and the names of its files.
    fn info(&self) -> Result<(String, Vec<String>), Unreachable> {
        let repo = self.api.repo(self.repo(&self.revision));
        let answer = bounded(&AtomicU64::new(0), move || repo.info());
        let info = answer
            .map_err(|error| Unreachable {
                refused: false,
                error,
            })?
            .map_err(|error| self.explain(&error))?;
        let names = info.siblings.into_iter().map(|file| file.rfilename);
        Ok((info.sha, names.collect()))
    }

    fn download(&self, commit: &str, wanted: &[String]) -> anyhow::Result<PathBuf> {
        let cached = self.cache.repo(self.repo(&self.revision));
        let dir = cached.pointer_path(commit);
        let known = cached
            .get("config.json")
            .is_some_and(|path| path.starts_with(&dir));
        let there = |file: &String| dir.join(file).exists();
        if known && wanted.iter().all(there) {
            return Ok(dir);
        }
        output::diagnostic(&format!(
            "downloading {} ({commit}) into {}",
            self.id,
            self.cache.path().display()
        ));
        for file in wanted {
            // A file that is there without the name of the revision was left by a run that did not end.
            if !there(file) {
                self.download_file(commit, file)?;
            }
            if !verified(&dir.join(file))? {
                self.download_file(commit, file)?;
                ensure!(
                    verified(&dir.join(file))?,
                    "{file} of {} has wrong contents each time it is downloaded from {}; it was not kept",
                    self.id,
                    self.endpoint
                );
            }
        }
        // Only now others find it by the name of the revision.
        cached
            .create_ref(commit)
            .with_context(|| format!("{} cannot be written", self.cache.path().display()))?;
        Ok(dir)
    }

    fn download_file(&self, commit: &str, file: &str) -> anyhow::Result<()> {
        let pointer = self.cache.repo(self.repo(commit)).pointer_path(commit);
        let pointer = pointer.join(file);
        if !pointer.exists() {
            // A link whose blob was removed would be in the way; where there is none, nothing is.
            let _ = fs::remove_file(&pointer);
        }
        let until = Instant::now() + OTHER_PROCESS;
        loop {
            let repo: ApiRepo = self.api.repo(self.repo(commit));
            let came = Arc::new(AtomicU64::new(0));
            let shown = Shown::new(Arc::clone(&came));
            let name = file.to_owned();
            let done = bounded(&came, move || repo.download_with_progress(&name, shown));
            match done.with_context(|| format!("downloading {file} of {}", self.id))? {
                Ok(_) => return Ok(()),
                Err(ApiError::LockAcquisition(_)) if Instant::now() < until => {
                    output::diagnostic(&format!("  {file}: another process downloads it"));
                }
                Err(error) => {
                    let Unreachable { error, .. } = self.explain(&error);
                    return Err(error.context(format!("downloading {file}")));
                }
            }
        }
    }

    fn repo(&self, revision: &str) -> Repo {
        Repo::with_revision(self.id.clone(), RepoType::Model, revision.to_owned())
    }

    /// What an error of the hub means, and what to do.
    fn explain(&self, error: &ApiError) -> Unreachable {
        let Self {
            id,
            revision,
            endpoint,
            ..
        } = self;
        let status = match error {
            ApiError::RequestError(error) => match **error {
                ureq::Error::StatusCode(status) => Some(status),
                _ => None,
            },
            _ => None,
        };
        let text = match status {
            Some(401 | 404) => format!(
                "{endpoint} has no model {id} with revision {revision}, or it is private: check the name, or \
                 set HF_TOKEN"
            ),
            Some(403) => format!(
                "{endpoint} refuses {id}: accept its terms at {endpoint}/{id} and set HF_TOKEN to a token of \
                 that account"
            ),
            Some(status) => format!("{endpoint} answers {status} for {id}"),
            None => format!("{endpoint} cannot be asked for {id}: {error}"),
        };
        Unreachable {
            refused: matches!(status, Some(400..=499)),
            error: anyhow!(text),
        }
    }
}

/// The hub gave nothing.
struct Unreachable {
    /// It said no: what is cached is no answer to that.
    refused: bool,
    error: anyhow::Error,
}

/// Does `work` on a thread of its own, and gives up when `came` stands still for too long. The client
/// has no bound of its own; a thread that hangs ends with the process.
fn bounded<T: Send + 'static>(
    came: &AtomicU64,
    work: impl FnOnce() -> T + Send + 'static,
) -> anyhow::Result<T> {
    let (done, result) = mpsc::channel();
    thread::Builder::new()
        .name("hub".to_owned())
        .spawn(move || {
            // Whoever waited may have given up.
            let _ = done.send(work());
        })
        .context("a thread for the download cannot be started")?;
    let mut seen = came.load(Ordering::Relaxed);
    loop {
        match result.recv_timeout(SILENCE) {
            Ok(result) => return Ok(result),
            Err(mpsc::RecvTimeoutError::Disconnected) => bail!("the download ended unexpectedly"),
            Err(mpsc::RecvTimeoutError::Timeout) => {
                let now = came.load(Ordering::Relaxed);
                ensure!(
                    now > seen,
                    "the hub sent nothing for {} s; try again, what came is kept",
                    SILENCE.as_secs()
                );
                seen = now;
            }
        }
    }
}

/// Whether a file of a snapshot has the contents that the name of its blob tells; it is removed if not.
fn verified(pointer: &Path) -> anyhow::Result<bool> {
    let blob = pointer
        .canonicalize()
        .with_context(|| format!("{} cannot be opened", pointer.display()))?;
    let tag = blob.file_name().and_then(|name| name.to_str());
    let right = verify::matches(&blob, tag.unwrap_or_default())
        .with_context(|| format!("{} cannot be read", blob.display()))?;
    if !right {
        for path in [pointer, &blob] {
            fs::remove_file(path)
                .with_context(|| format!("{} cannot be removed", path.display()))?;
        }
    }
    Ok(right)
}
