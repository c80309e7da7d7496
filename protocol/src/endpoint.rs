//! Endpoint names: `dyn://NAMESPACE.COMPONENT.ENDPOINT`.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// A name under which instances of a component are found.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct EndpointId {
    namespace: String,
    component: String,
    endpoint: String,
}

/// Why a string is not an endpoint name.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error(
    "'{input}' is not an endpoint: {reason}; accepted: dyn://NAMESPACE.COMPONENT.ENDPOINT, each part of \
     a-z, A-Z, 0-9, '-' and '_'"
)]
pub struct EndpointParseError {
    input: String,
    reason: &'static str,
}

impl EndpointId {
    /// The name made of the three parts.
    ///
    /// # Errors
    /// When a part is empty or has a character outside the accepted ones.
    pub fn new(
        namespace: &str,
        component: &str,
        endpoint: &str,
    ) -> Result<Self, EndpointParseError> {
        format!("{namespace}.{component}.{endpoint}").parse()
    }

    /// First part: the deployment.
    #[must_use]
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// Second part: the role inside the deployment, such as `prefill`.
    #[must_use]
    pub fn component(&self) -> &str {
        &self.component
    }

    /// Third part: the operation, such as `generate`.
    #[must_use]
    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// The same component under another operation.
    ///
    /// # Errors
    /// When `endpoint` is empty or has a character outside the accepted ones.
    pub fn with_endpoint(&self, endpoint: &str) -> Result<Self, EndpointParseError> {
        Self::new(&self.namespace, &self.component, endpoint)
    }
}

impl FromStr for EndpointId {
    type Err = EndpointParseError;

    fn from_str(input: &str) -> Result<Self, Self::Err> {
        let error = |reason| EndpointParseError {
            input: input.to_owned(),
            reason,
        };
        let name = input.strip_prefix("dyn://").unwrap_or(input);
        let parts: Vec<&str> = name.split('.').collect();
        let [namespace, component, endpoint] = parts[..] else {
            return Err(error("it needs three parts separated by '.'"));
        };
        for part in [namespace, component, endpoint] {
            if part.is_empty() {
                return Err(error("a part is empty"));
            }
            if !part
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
            {
                return Err(error("a part has a character that is not accepted"));
            }
        }
        Ok(Self {
            namespace: namespace.to_owned(),
            component: component.to_owned(),
            endpoint: endpoint.to_owned(),
        })
    }
}

impl fmt::Display for EndpointId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "dyn://{}.{}.{}",
            self.namespace, self.component, self.endpoint
        )
    }
}

impl TryFrom<String> for EndpointId {
    type Error = EndpointParseError;

    fn try_from(input: String) -> Result<Self, Self::Error> {
        input.parse()
    }
}

impl From<EndpointId> for String {
    fn from(endpoint: EndpointId) -> Self {
        endpoint.to_string()
    }
}
