//! The stores' clients, from their configuration; and their errors, sorted.

use std::sync::Arc;
use std::time::Duration;

use object_store::aws::AmazonS3Builder;
use object_store::azure::MicrosoftAzureBuilder;
use object_store::gcp::GoogleCloudStorageBuilder;
use object_store::local::LocalFileSystem;
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{BackoffConfig, ObjectStore, RetryConfig};

use super::config::{
    AzureConfig, AzureCredentials, GcsConfig, GcsCredentials, ObjectConfig, ObjectLocation,
    S3Config, S3Credentials,
};
use super::http::{Connector, LastAnswer};
use crate::storage::{OpenError, StorageErrorKind};

/// Longest pause between two tries.
const PAUSE_MAX: Duration = Duration::from_secs(5);

/// An open store.
#[derive(Debug)]
pub(super) struct Client {
    pub(super) store: Arc<dyn ObjectStore>,
    /// In errors, logs and plans.
    pub(super) name: String,
    /// Put in front of every key.
    prefix: Option<Path>,
    /// Requests leave this process: one that is dropped is off this process's hands.
    pub(super) remote: bool,
    /// Bound on each answer.
    pub(super) timeout: Duration,
}

impl Client {
    pub(super) fn open(config: &ObjectConfig) -> Result<Self, OpenError> {
        let mut name = name_of(&config.location);
        let timeout = config.request_timeout;
        let invalid = |field, got: String, accepted| OpenError::InvalidConfig {
            field,
            got,
            accepted,
        };
        if timeout.is_zero() {
            return Err(invalid("request_timeout", "0".into(), "more than 0"));
        }
        let prefix = match &config.prefix {
            None => None,
            Some(prefix) => Some(Path::parse(prefix).map_err(|error| {
                invalid(
                    "prefix",
                    format!("{prefix:?} ({error})"),
                    "parts separated by single slashes",
                )
            })?),
        };
        let failed = |message: String| OpenError::ObjectStore {
            name: name.clone(),
            message,
        };
        let refused = |error: object_store::Error| failed(error.to_string());
        let connector = || Connector::new(timeout).map_err(failed);
        let retry = RetryConfig {
            backoff: BackoffConfig {
                init_backoff: config.retry_pause,
                max_backoff: PAUSE_MAX.max(config.retry_pause),
                base: 2.0,
            },
            max_retries: config.retries_max,
            retry_timeout: config.retry_timeout,
        };
        let store: Arc<dyn ObjectStore> = match &config.location {
            ObjectLocation::Memory => Arc::new(InMemory::new()),
            ObjectLocation::Folder(folder) => {
                std::fs::create_dir_all(folder).map_err(|source| OpenError::Io {
                    what: "make folder",
                    name: folder.display().to_string(),
                    source,
                })?;
                Arc::new(LocalFileSystem::new_with_prefix(folder).map_err(refused)?)
            }
            ObjectLocation::S3(s3) => Arc::new(
                self::s3(s3)
                    .with_retry(retry)
                    .with_http_connector(connector()?)
                    .build()
                    .map_err(refused)?,
            ),
            ObjectLocation::Gcs(gcs) => Arc::new(
                self::gcs(gcs)
                    .with_retry(retry)
                    .with_http_connector(connector()?)
                    .build()
                    .map_err(refused)?,
            ),
            ObjectLocation::Azure(azure) => Arc::new(
                self::azure(azure)
                    .with_retry(retry)
                    .with_http_connector(connector()?)
                    .build()
                    .map_err(refused)?,
            ),
        };
        if let Some(prefix) = &prefix {
            name = format!("{name}/{prefix}");
        }
        let remote = !matches!(
            config.location,
            ObjectLocation::Memory | ObjectLocation::Folder(_)
        );
        Ok(Self {
            store,
            name,
            prefix,
            remote,
            timeout,
        })
    }

    /// The full path of a key.
    pub(super) fn path(&self, key: &str) -> Result<Path, String> {
        let path = Path::parse(key).map_err(|error| error.to_string())?;
        if path.is_root() {
            return Err("it is empty".to_owned());
        }
        Ok(match &self.prefix {
            Some(prefix) => prefix.parts().chain(path.parts()).collect(),
            None => path,
        })
    }

    /// What is put in front of every key.
    pub(super) const fn prefix(&self) -> Option<&Path> {
        self.prefix.as_ref()
    }

    /// The key of a path that the store named; none when it is not below the prefix.
    pub(super) fn key(&self, path: &Path) -> Option<String> {
        let Some(prefix) = &self.prefix else {
            return Some(path.as_ref().to_owned());
        };
        let key = path.as_ref().strip_prefix(prefix.as_ref())?;
        key.strip_prefix('/').map(str::to_owned)
    }

    /// How errors name an object.
    pub(super) fn object(&self, path: &Path) -> String {
        match &self.prefix {
            // The name ends with the prefix already.
            Some(prefix) => {
                let path = path.as_ref();
                let key = path.strip_prefix(prefix.as_ref()).unwrap_or(path);
                format!("{}/{}", self.name, key.trim_start_matches('/'))
            }
            None => format!("{}/{path}", self.name),
        }
    }
}

fn name_of(location: &ObjectLocation) -> String {
    match location {
        ObjectLocation::Memory => "memory:".to_owned(),
        ObjectLocation::Folder(folder) => format!("folder:{}", folder.display()),
        ObjectLocation::S3(s3) => format!("s3://{}", s3.bucket),
        ObjectLocation::Gcs(gcs) => format!("gs://{}", gcs.bucket),
        ObjectLocation::Azure(azure) => format!("az://{}/{}", azure.account, azure.container),
    }
}

fn s3(config: &S3Config) -> AmazonS3Builder {
    let mut builder = AmazonS3Builder::new()
        .with_bucket_name(&config.bucket)
        .with_region(&config.region)
        // One request per object: not every server that speaks the protocol knows the other one.
        .with_disable_bulk_delete(true);
    if let Some(endpoint) = &config.endpoint {
        builder = builder
            .with_endpoint(endpoint)
            .with_allow_http(endpoint.starts_with("http://"));
    }
    match &config.credentials {
        S3Credentials::Keys { id, secret, token } => {
            builder = builder
                .with_access_key_id(id)
                .with_secret_access_key(secret.reveal());
            match token {
                Some(token) => builder.with_token(token.reveal()),
                None => builder,
            }
        }
        S3Credentials::Instance => builder,
        S3Credentials::Anonymous => builder.with_skip_signature(true),
    }
}

fn gcs(config: &GcsConfig) -> GoogleCloudStorageBuilder {
    let mut builder = GoogleCloudStorageBuilder::new().with_bucket_name(&config.bucket);
    if let Some(endpoint) = &config.endpoint {
        builder = builder.with_base_url(endpoint);
    }
    match &config.credentials {
        GcsCredentials::ServiceAccountFile(path) => {
            builder.with_service_account_path(path.to_string_lossy())
        }
        GcsCredentials::ServiceAccountKey(key) => builder.with_service_account_key(key.reveal()),
        GcsCredentials::Instance => builder,
        GcsCredentials::Anonymous => builder.with_skip_signature(true),
    }
}

fn azure(config: &AzureConfig) -> MicrosoftAzureBuilder {
    let mut builder = MicrosoftAzureBuilder::new()
        .with_account(&config.account)
        .with_container_name(&config.container);
    if let Some(endpoint) = &config.endpoint {
        builder = builder
            .with_endpoint(endpoint.clone())
            .with_allow_http(endpoint.starts_with("http://"));
    }
    match &config.credentials {
        AzureCredentials::AccountKey(key) => builder.with_access_key(key.reveal()),
        AzureCredentials::Client { tenant, id, secret } => {
            builder.with_client_secret_authorization(id, secret.reveal(), tenant)
        }
        AzureCredentials::Instance => builder,
        AzureCredentials::Anonymous => builder.with_skip_signature(true),
    }
}

/// Sorts an error of a client; `last` is how its last request ended.
pub(super) fn kind_of(error: &object_store::Error, last: LastAnswer) -> StorageErrorKind {
    use object_store::Error;
    match (error, last) {
        (Error::NotFound { .. }, _) => StorageErrorKind::NotFound,
        (Error::AlreadyExists { .. }, _) => {
            StorageErrorKind::Precondition("it exists already".to_owned())
        }
        (Error::Precondition { .. } | Error::NotModified { .. }, _) => {
            StorageErrorKind::Precondition("it is another one".to_owned())
        }
        (Error::PermissionDenied { .. } | Error::Unauthenticated { .. }, _)
        | (_, LastAnswer::Status(401 | 403)) => StorageErrorKind::Denied,
        (_, LastAnswer::Status(404)) => StorageErrorKind::NotFound,
        (_, LastAnswer::Status(429 | 503)) => StorageErrorKind::Throttled,
        (_, LastAnswer::TimedOut | LastAnswer::Status(408 | 504)) => StorageErrorKind::TimedOut,
        _ => match errno_of(error) {
            Some(errno) => StorageErrorKind::of_errno(errno),
            None => StorageErrorKind::Other {
                errno: None,
                message: error.to_string(),
            },
        },
    }
}

/// The system's error behind one of a folder.
fn errno_of(error: &object_store::Error) -> Option<i32> {
    let mut source = std::error::Error::source(error);
    while let Some(error) = source {
        if let Some(io) = error.downcast_ref::<std::io::Error>() {
            return io.raw_os_error();
        }
        source = error.source();
    }
    None
}
