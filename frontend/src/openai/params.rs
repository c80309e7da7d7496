//! Reading a request body: every error names the parameter, what was found, and what is accepted.

use std::ops::RangeInclusive;

use serde_json::{Map, Value, error::Category};

use crate::error::ApiError;

/// The fields of a JSON object. A field that is `null` counts as absent.
#[derive(Debug)]
pub(crate) struct Params {
    fields: Map<String, Value>,
}

impl Params {
    /// The object in a request body.
    pub(crate) fn parse(body: &[u8]) -> Result<Self, ApiError> {
        let text = str::from_utf8(body).map_err(|error| {
            ApiError::malformed(format!(
                "the request body is not valid UTF-8: byte {} is not part of a character",
                error.valid_up_to()
            ))
        })?;
        if text.trim_ascii().is_empty() {
            return Err(ApiError::malformed(
                "the request body is empty; accepted: a JSON object",
            ));
        }
        match serde_json::from_str(text) {
            Ok(Value::Object(fields)) => Ok(Self { fields }),
            Ok(_) => Err(ApiError::malformed(
                "the request body is JSON but not an object; accepted: {\"model\": ..., ...}",
            )),
            Err(error) => Err(ApiError::malformed(describe(&error))),
        }
    }

    pub(crate) fn get(&self, name: &str) -> Option<&Value> {
        self.fields.get(name).filter(|value| !value.is_null())
    }

    /// Takes the field out, to use its contents without a copy.
    pub(crate) fn take(&mut self, name: &str) -> Option<Value> {
        self.fields
            .get_mut(name)
            .map(Value::take)
            .filter(|value| !value.is_null())
    }

    pub(crate) fn number(
        &self,
        name: &'static str,
        accepted: RangeInclusive<f64>,
    ) -> Result<Option<f64>, ApiError> {
        let Some(value) = self.get(name) else {
            return Ok(None);
        };
        let number = value.as_f64().filter(|number| accepted.contains(number));
        number.map(Some).ok_or_else(|| {
            let (min, max) = (accepted.start(), accepted.end());
            ApiError::value(name, value, &format!("a number from {min} to {max}"))
        })
    }

    pub(crate) fn integer(
        &self,
        name: &'static str,
        accepted: RangeInclusive<i64>,
    ) -> Result<Option<i64>, ApiError> {
        let Some(value) = self.get(name) else {
            return Ok(None);
        };
        let number = value.as_i64().filter(|number| accepted.contains(number));
        number.map(Some).ok_or_else(|| {
            let (min, max) = (accepted.start(), accepted.end());
            ApiError::value(name, value, &format!("an integer from {min} to {max}"))
        })
    }

    /// An integer that fits 32 bits, at least `min`.
    pub(crate) fn count(&self, name: &'static str, min: u32) -> Result<Option<u32>, ApiError> {
        let number = self.integer(name, i64::from(min)..=i64::from(u32::MAX))?;
        Ok(number.and_then(|number| u32::try_from(number).ok()))
    }

    pub(crate) fn boolean(&self, name: &'static str) -> Result<Option<bool>, ApiError> {
        boolean(name, self.get(name))
    }

    pub(crate) fn string(&self, name: &'static str) -> Result<Option<&str>, ApiError> {
        let Some(value) = self.get(name) else {
            return Ok(None);
        };
        let text = value.as_str();
        text.map(Some)
            .ok_or_else(|| ApiError::value(name, value, "a string"))
    }

    pub(crate) fn object(
        &self,
        name: &'static str,
    ) -> Result<Option<&Map<String, Value>>, ApiError> {
        let Some(value) = self.get(name) else {
            return Ok(None);
        };
        let fields = value.as_object();
        fields
            .map(Some)
            .ok_or_else(|| ApiError::value(name, value, "an object"))
    }

    /// Field `inner` of the object in field `outer`.
    pub(crate) fn nested(
        &self,
        outer: &'static str,
        inner: &str,
    ) -> Result<Option<&Value>, ApiError> {
        let object = self.object(outer)?;
        Ok(object
            .and_then(|fields| fields.get(inner))
            .filter(|value| !value.is_null()))
    }
}

/// `value` as a boolean, for the parameter `name`.
pub(crate) fn boolean(name: &'static str, value: Option<&Value>) -> Result<Option<bool>, ApiError> {
    let Some(value) = value else {
        return Ok(None);
    };
    let flag = value.as_bool();
    flag.map(Some)
        .ok_or_else(|| ApiError::value(name, value, "true or false"))
}

/// What is wrong with a JSON text and where, in words for its author.
fn describe(error: &serde_json::Error) -> String {
    let place = format!("line {}, column {}", error.line(), error.column());
    if error.classify() == Category::Eof {
        return format!("the request body is not valid JSON: it ends too early, at {place}");
    }
    let text = error.to_string();
    let reason = text
        .rsplit_once(" at line ")
        .map_or(text.as_str(), |(reason, _)| reason);
    format!("the request body is not valid JSON: {reason} at {place}")
}
