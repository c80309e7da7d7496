//! Typed configuration of object stores.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

/// An object store to open with [`Agent::open_objects`](crate::Agent::open_objects).
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct ObjectConfig {
    /// Where the objects are.
    pub location: ObjectLocation,
    /// Put in front of every key, with a slash between. Default none.
    pub prefix: Option<String>,
    /// How often a request is repeated after a refusal that may pass (5xx, 429, a broken
    /// connection). Default 5. Meaningless for folders and memory.
    pub retries_max: usize,
    /// A request is not repeated any more after this time. Default 20 s.
    pub retry_timeout: Duration,
    /// Pause before the first repetition; it doubles each time, up to 5 s. Default 50 ms.
    pub retry_pause: Duration,
    /// Bound on each answer, and on each pause within the body of one. Default 10 s.
    pub request_timeout: Duration,
}

impl ObjectConfig {
    /// The defaults, for the store at `location`.
    #[must_use]
    pub const fn new(location: ObjectLocation) -> Self {
        Self {
            location,
            prefix: None,
            retries_max: 5,
            retry_timeout: Duration::from_secs(20),
            retry_pause: Duration::from_millis(50),
            request_timeout: Duration::from_secs(10),
        }
    }

    /// The same below a prefix.
    #[must_use]
    pub fn with_prefix(mut self, prefix: impl Into<String>) -> Self {
        self.prefix = Some(prefix.into());
        self
    }
}

/// Where objects are.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum ObjectLocation {
    /// In memory of this process, for tests: gone with the store.
    Memory,
    /// Files below a folder, which is made if it is missing.
    Folder(PathBuf),
    /// S3, or anything that speaks its protocol.
    S3(S3Config),
    /// Google Cloud Storage.
    Gcs(GcsConfig),
    /// Azure Blob Storage.
    Azure(AzureConfig),
}

/// A string that does not appear in logs.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    pub(super) fn reveal(&self) -> &str {
        &self.0
    }
}

impl<T: Into<String>> From<T> for Secret {
    fn from(secret: T) -> Self {
        Self(secret.into())
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

/// A bucket of S3.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct S3Config {
    /// Name of the bucket.
    pub bucket: String,
    /// Region. Default `us-east-1`.
    pub region: String,
    /// Base address of another server that speaks the protocol, such as `http://127.0.0.1:9000`;
    /// the bucket is the first part of its paths. Default none: AWS.
    pub endpoint: Option<String>,
    /// Who asks. Default [`S3Credentials::Instance`].
    pub credentials: S3Credentials,
}

/// Who asks S3.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum S3Credentials {
    /// A key pair.
    Keys {
        /// Access key.
        id: String,
        /// Its secret.
        secret: Secret,
        /// Token of a session, if it is one.
        token: Option<Secret>,
    },
    /// The role of the machine, from its metadata service.
    Instance,
    /// Nobody: requests are not signed.
    Anonymous,
}

impl S3Config {
    /// A bucket of AWS in `us-east-1`, with the credentials of the machine.
    pub fn new(bucket: impl Into<String>) -> Self {
        Self {
            bucket: bucket.into(),
            region: "us-east-1".to_owned(),
            endpoint: None,
            credentials: S3Credentials::Instance,
        }
    }
}

/// A bucket of Google Cloud Storage.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct GcsConfig {
    /// Name of the bucket.
    pub bucket: String,
    /// Base address of another server that speaks the protocol. Default none.
    pub endpoint: Option<String>,
    /// Who asks. Default [`GcsCredentials::Instance`].
    pub credentials: GcsCredentials,
}

/// Who asks Google Cloud Storage.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum GcsCredentials {
    /// A service account, by the path of its key file.
    ServiceAccountFile(PathBuf),
    /// A service account, by the JSON of its key.
    ServiceAccountKey(Secret),
    /// The account of the machine, from its metadata service.
    Instance,
    /// Nobody: requests are not signed.
    Anonymous,
}

impl GcsConfig {
    /// A bucket, with the account of the machine.
    pub fn new(bucket: impl Into<String>) -> Self {
        Self {
            bucket: bucket.into(),
            endpoint: None,
            credentials: GcsCredentials::Instance,
        }
    }
}

/// A container of Azure Blob Storage.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct AzureConfig {
    /// Storage account.
    pub account: String,
    /// Container.
    pub container: String,
    /// Base address of another server that speaks the protocol. Default none.
    pub endpoint: Option<String>,
    /// Who asks. Default [`AzureCredentials::Instance`].
    pub credentials: AzureCredentials,
}

/// Who asks Azure.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum AzureCredentials {
    /// The key of the account, in base 64.
    AccountKey(Secret),
    /// An application with its secret.
    Client {
        /// Tenant of the application.
        tenant: String,
        /// Its id.
        id: String,
        /// Its secret.
        secret: Secret,
    },
    /// The identity of the machine, from its metadata service.
    Instance,
    /// Nobody: requests are not signed.
    Anonymous,
}

impl AzureConfig {
    /// A container, with the identity of the machine.
    pub fn new(account: impl Into<String>, container: impl Into<String>) -> Self {
        Self {
            account: account.into(),
            container: container.into(),
            endpoint: None,
            credentials: AzureCredentials::Instance,
        }
    }
}
