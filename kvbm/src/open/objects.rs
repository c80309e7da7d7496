//! G4 in an object store: from settings to an open tier.

use std::sync::Arc;

use blockplane_transfer::{Agent, ObjectConfig, ObjectLocation, S3Config, S3Credentials};

use super::OpenError;
use crate::{
    arena::KvArena,
    fingerprint::Fingerprint,
    remote::{ObjectTier, ObjectTierConfig},
    settings::KvbmSettings,
};

/// Opens the object store that the settings describe, over the blocks of `host`. Nobody is asked yet: a
/// store that does not answer is a tier without hits.
pub(super) fn open(
    settings: &KvbmSettings,
    worker: &str,
    agent: &Agent,
    host: &Arc<KvArena>,
    fingerprint: Fingerprint,
) -> Result<Arc<ObjectTier>, OpenError> {
    let location = location(settings, worker)?;
    let store = agent.open_objects(&ObjectConfig::new(location))?;
    tracing::info!(store = store.name(), "KV tiers: G4 opened");
    let config = ObjectTierConfig {
        names_max: settings.object_num_blocks.value as usize,
        ..ObjectTierConfig::default()
    };
    ObjectTier::open(agent, store, Arc::clone(host), fingerprint, config)
        .map_err(OpenError::Objects)
}

fn location(settings: &KvbmSettings, worker: &str) -> Result<ObjectLocation, OpenError> {
    let bucket = settings
        .object_bucket
        .value
        .as_ref()
        .ok_or(OpenError::NoBucket)?;
    let mut s3 = S3Config::new(bucket.replace("{worker_id}", worker));
    s3.endpoint.clone_from(&settings.object_endpoint.value);
    if let Some(region) = &settings.object_region.value {
        s3.region.clone_from(region);
    }
    let key = &settings.object_access_key.value;
    let secret = &settings.object_secret_key.value;
    if let (Some(key), Some(secret)) = (key, secret) {
        s3.credentials = S3Credentials::Keys {
            id: key.reveal().to_owned(),
            secret: secret.reveal().into(),
            token: None,
        };
    }
    Ok(ObjectLocation::S3(s3))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::settings::resolve;

    #[test]
    fn variables_become_a_bucket_and_secrets_stay_secret() {
        let variables = [
            ("DYN_KVBM_OBJECT_ENABLED", "true"),
            ("DYN_KVBM_OBJECT_BUCKET", "kv-{worker_id}"),
            ("DYN_KVBM_OBJECT_ENDPOINT", "http://127.0.0.1:9000"),
            ("DYN_KVBM_OBJECT_REGION", "eu-central-1"),
            ("DYN_KVBM_OBJECT_ACCESS_KEY", "reader"),
            ("DYN_KVBM_OBJECT_SECRET_KEY", "hunter2"),
        ];
        let variables = variables.map(|(name, value)| (name.to_owned(), value.to_owned()));
        let settings = resolve(variables.into_iter(), None, &Default::default()).expect("valid");
        let location = location(&settings, "7").expect("a bucket");
        let ObjectLocation::S3(s3) = &location else {
            panic!("{location:?}");
        };
        assert_eq!(s3.bucket, "kv-7");
        assert_eq!(s3.endpoint.as_deref(), Some("http://127.0.0.1:9000"));
        assert_eq!(s3.region, "eu-central-1");
        assert!(
            matches!(&s3.credentials, S3Credentials::Keys { id, .. } if id == "reader"),
            "{s3:?}"
        );
        assert!(!format!("{location:?}").contains("hunter2"));
    }
}
