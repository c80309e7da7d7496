//! Bandwidth over block size as a picture.

use std::{fs, path::Path};

use anyhow::{Context, bail, ensure};

use crate::report::{Chart, Panel, Record, Series};

/// How a picture is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Drawing {
    Svg,
    Png,
}

impl Drawing {
    /// By the end of the file's name.
    pub(super) fn of(path: &Path) -> anyhow::Result<Self> {
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("svg") => Ok(Self::Svg),
            Some("png") => Ok(Self::Png),
            _ => bail!(
                "--plot {}: accepted: a name that ends in .svg or .png",
                path.display()
            ),
        }
    }
}

/// Draws the bandwidths among the records: one panel for each operation and pattern, one line for
/// each lane and count, limits dashed.
pub(super) fn write(path: &Path, records: &[Record]) -> anyhow::Result<()> {
    let chart = chart(records);
    ensure!(
        !chart.panels.is_empty(),
        "no bandwidth was measured to plot"
    );
    let bytes = match Drawing::of(path)? {
        Drawing::Svg => chart.svg().into_bytes(),
        Drawing::Png => chart.png()?,
    };
    fs::write(path, bytes).with_context(|| format!("cannot write {}", path.display()))
}

fn chart(records: &[Record]) -> Chart {
    let mut panels: Vec<Panel> = Vec::new();
    let mut records: Vec<&Record> = records
        .iter()
        .filter(|record| record.metric == "bandwidth_gb_per_s")
        .collect();
    // Lines are named in this order; the sort keeps what is equal as it is.
    records.sort_by_key(|record| record.case.get("count").and_then(serde_json::Value::as_u64));
    let lane = |record: &Record| record.case.get("lane").map(ToString::to_string);
    let mut lanes: Vec<Option<String>> = Vec::new();
    for record in &records {
        if !lanes.contains(&lane(record)) {
            lanes.push(lane(record));
        }
    }
    records.sort_by_key(|record| lanes.iter().position(|known| *known == lane(record)));
    for record in records {
        let text = |field: &str| {
            record
                .case
                .get(field)
                .map_or("", |v| v.as_str().unwrap_or(""))
        };
        let number = |field: &str| record.case.get(field).and_then(serde_json::Value::as_f64);
        let count = number("count").or_else(|| number("in_flight"));
        let (Some(bytes), Some(count)) = (number("block_bytes"), count) else {
            continue;
        };
        let panel = find(
            &mut panels,
            |panel| &panel.title,
            match text("pattern") {
                "" => text("op").to_owned(),
                pattern => format!("{}, {pattern}", text("op")),
            },
            |title| Panel {
                title,
                series: Vec::new(),
            },
        );
        let label = format!("{} x{count}", text("lane"));
        for (bound, value) in [(false, Some(record.value)), (true, record.limit)] {
            let Some(value) = value else { continue };
            let place = panel
                .series
                .iter()
                .position(|series| series.label == label && series.bound == bound);
            let place = place.unwrap_or_else(|| {
                panel.series.push(Series {
                    label: label.clone(),
                    bound,
                    points: Vec::new(),
                });
                panel.series.len() - 1
            });
            panel.series[place].points.push((bytes, value));
        }
    }
    for series in panels.iter_mut().flat_map(|panel| &mut panel.series) {
        series.points.sort_by(|a, b| a.0.total_cmp(&b.0));
    }
    Chart {
        title: "blockplane bench transfer: bandwidth by lane and blocks of one transfer".to_owned(),
        x_label: "block size in bytes".to_owned(),
        y_label: "GB/s".to_owned(),
        y_percent: false,
        panels,
    }
}

/// The element of this name, made where there is none yet.
fn find<T>(
    all: &mut Vec<T>,
    name: impl Fn(&T) -> &String,
    wanted: String,
    make: impl FnOnce(String) -> T,
) -> &mut T {
    let place = match all.iter().position(|one| *name(one) == wanted) {
        Some(place) => place,
        None => {
            all.push(make(wanted));
            all.len() - 1
        }
    };
    &mut all[place]
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::report::case;

    #[test]
    fn each_lane_and_count_is_a_line_beside_its_limit() {
        let record = |lane: &str, op: &str, bytes: u32, value: f64| {
            let case = case([
                ("lane", json!(lane)),
                ("op", json!(op)),
                ("pattern", json!("scattered")),
                ("block_bytes", json!(bytes)),
                ("count", json!(16)),
            ]);
            Record::new("transfer", case, "bandwidth_gb_per_s", "GB/s", value, 1)
                .limit(Some(value * 2.0))
        };
        let records = [
            record("shm", "write", 65536, 20.0),
            record("shm", "write", 4096, 10.0),
            record("tcp", "write", 4096, 3.0),
            record("shm", "read", 4096, 9.0),
        ];
        let chart = chart(&records);
        let titles: Vec<_> = chart.panels.iter().map(|panel| &panel.title).collect();
        assert_eq!(titles, ["write, scattered", "read, scattered"]);
        let shm = &chart.panels[0].series[0];
        assert_eq!((shm.label.as_str(), shm.bound), ("shm x16", false));
        assert_eq!(shm.points, [(4096.0, 10.0), (65536.0, 20.0)]);
        let limit = &chart.panels[0].series[1];
        assert_eq!(limit.points, [(4096.0, 20.0), (65536.0, 40.0)]);
        assert_eq!(chart.panels[0].series.len(), 4);
    }

    #[test]
    fn the_name_says_the_format() {
        assert_eq!(Drawing::of("a/b.svg".as_ref()).unwrap(), Drawing::Svg);
        assert_eq!(Drawing::of("b.png".as_ref()).unwrap(), Drawing::Png);
        assert!(Drawing::of("b.jpg".as_ref()).is_err());
        assert!(Drawing::of("png".as_ref()).is_err());
    }
}
