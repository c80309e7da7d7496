//! The text form of Prometheus metrics, as much of it as a vLLM server writes.

/// The samples of one reading.
#[derive(Debug, Default)]
pub(super) struct Samples(Vec<Sample>);

/// One line.
#[derive(Debug)]
pub(super) struct Sample {
    name: String,
    labels: Vec<(String, String)>,
    value: f64,
}

impl Samples {
    /// Reads all lines that are samples.
    pub(super) fn parse(text: &str) -> Self {
        Self(text.lines().filter_map(Sample::parse).collect())
    }

    /// The samples of one metric.
    pub(super) fn named<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a Sample> {
        self.0.iter().filter(move |sample| sample.name == name)
    }

    /// The value of a metric for one data-parallel rank.
    pub(super) fn of_rank(&self, name: &str, rank: u32) -> Option<f64> {
        let rank = rank.to_string();
        let mut samples = self.named(name);
        samples
            .find(|sample| sample.label("engine") == Some(&rank))
            .map(|sample| sample.value)
    }
}

impl Sample {
    /// The value of a label.
    pub(super) fn label(&self, name: &str) -> Option<&str> {
        let mut labels = self.labels.iter();
        let found = labels.find(|(label, _)| label == name)?;
        Some(&found.1)
    }

    fn parse(line: &str) -> Option<Self> {
        if line.starts_with('#') {
            return None;
        }
        let end = line.find(['{', ' '])?;
        let (name, rest) = line.split_at(end);
        let (labels, value) = match rest.strip_prefix('{') {
            Some(rest) => labels(rest)?,
            None => (Vec::new(), rest),
        };
        Some(Self {
            name: name.to_owned(),
            labels,
            value: value.split_whitespace().next()?.parse().ok()?,
        })
    }
}

/// Labels up to the closing brace, and what follows it.
fn labels(text: &str) -> Option<(Vec<(String, String)>, &str)> {
    let mut labels = Vec::new();
    let mut rest = text;
    loop {
        rest = rest.trim_start_matches([',', ' ']);
        if let Some(after) = rest.strip_prefix('}') {
            return Some((labels, after));
        }
        let (name, quoted) = rest.split_once("=\"")?;
        let mut value = String::new();
        let mut characters = quoted.char_indices();
        let end = loop {
            match characters.next()? {
                (at, '"') => break at,
                (_, '\\') => match characters.next()?.1 {
                    'n' => value.push('\n'),
                    other => value.push(other),
                },
                (_, other) => value.push(other),
            }
        };
        labels.push((name.to_owned(), value));
        rest = &quoted[end + 1..];
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_are_found_by_name_and_rank() {
        let samples = Samples::parse(concat!(
            "# TYPE a gauge\n",
            "a{engine=\"0\",model_name=\"m\"} 3.0\n",
            "a{engine=\"1\",model_name=\"m\"} 4e2 1700000000\n",
            "a_total{engine=\"1\"} 7\n",
            "plain 1.5\n",
            "broken{x=\"1} 2\nnonsense\n",
        ));
        assert_eq!(samples.of_rank("a", 0), Some(3.0));
        assert_eq!(samples.of_rank("a", 1), Some(400.0));
        assert_eq!(samples.of_rank("a", 2), None);
        assert_eq!(samples.named("plain").count(), 1);
        assert_eq!(samples.0.len(), 4);
    }

    #[test]
    fn label_values_hold_any_character() {
        let samples = Samples::parse(r#"m{a="x,y=\"}\\",b=""} 1"#);
        let sample = samples.named("m").next().unwrap();
        assert_eq!(sample.label("a"), Some(r#"x,y="}\"#));
        assert_eq!(sample.label("b"), Some(""));
    }
}
