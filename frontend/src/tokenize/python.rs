//! The parts of Python that chat templates see: JSON as `json.dumps` writes it and `strftime`.

use std::fmt::Write as _;

use minijinja::{Error, ErrorKind, Value, value::ValueKind};

/// How `json.dumps` lays out its output.
#[derive(Clone, Debug)]
pub(super) struct JsonStyle {
    /// Spaces (or other text) per level; `None` writes one line.
    pub(super) indent: Option<String>,
    /// Between items.
    pub(super) item_separator: String,
    /// Between key and value.
    pub(super) key_separator: String,
    /// Keys in code point order instead of insertion order.
    pub(super) sort_keys: bool,
    /// Other characters than ASCII as `\u` escapes.
    pub(super) ensure_ascii: bool,
}

/// `value` as JSON.
pub(super) fn json_dumps(value: &Value, style: &JsonStyle) -> Result<String, Error> {
    let mut out = String::new();
    write_value(&mut out, value, style, 0)?;
    Ok(out)
}

fn write_value(
    out: &mut String,
    value: &Value,
    style: &JsonStyle,
    level: usize,
) -> Result<(), Error> {
    match value.kind() {
        ValueKind::None => out.push_str("null"),
        ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
        ValueKind::Number if value.is_integer() => {
            let _ = write!(out, "{value}");
        }
        ValueKind::Number => out.push_str(&float(f64::try_from(value.clone())?)),
        ValueKind::String => write_string(out, value.as_str().unwrap_or_default(), style),
        ValueKind::Seq | ValueKind::Iterable => {
            let items = value.try_iter()?.map(|item| (None, item)).collect();
            write_items(out, ('[', ']'), items, style, level)?;
        }
        ValueKind::Map => {
            let mut items = Vec::new();
            for key in value.try_iter()? {
                let item = value.get_item(&key)?;
                let key = match key.kind() {
                    ValueKind::None => "null".to_owned(),
                    ValueKind::Bool => key.is_true().to_string(),
                    _ => key.to_string(),
                };
                items.push((Some(key), item));
            }
            if style.sort_keys {
                items.sort_by(|a, b| a.0.cmp(&b.0));
            }
            write_items(out, ('{', '}'), items, style, level)?;
        }
        kind => {
            return Err(Error::new(
                ErrorKind::BadSerialization,
                format!("{kind} cannot be written as JSON"),
            ));
        }
    }
    Ok(())
}

fn write_items(
    out: &mut String,
    (open, close): (char, char),
    items: Vec<(Option<String>, Value)>,
    style: &JsonStyle,
    level: usize,
) -> Result<(), Error> {
    out.push(open);
    if items.is_empty() {
        out.push(close);
        return Ok(());
    }
    let new_line = |out: &mut String, level: usize| {
        if let Some(indent) = &style.indent {
            out.push('\n');
            out.extend(std::iter::repeat_n(indent.as_str(), level));
        }
    };
    for (index, (key, item)) in items.into_iter().enumerate() {
        if index > 0 {
            out.push_str(&style.item_separator);
        }
        new_line(out, level + 1);
        if let Some(key) = key {
            write_string(out, &key, style);
            out.push_str(&style.key_separator);
        }
        write_value(out, &item, style, level + 1)?;
    }
    new_line(out, level);
    out.push(close);
    Ok(())
}

fn write_string(out: &mut String, text: &str, style: &JsonStyle) {
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            c if c < ' ' || (style.ensure_ascii && !c.is_ascii()) => {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    let _ = write!(out, "\\u{unit:04x}");
                }
            }
            c => out.push(c),
        }
    }
    out.push('"');
}

/// A float as Python's `repr` writes it.
pub(super) fn float(number: f64) -> String {
    if number.is_nan() {
        return "NaN".to_owned();
    }
    if number.is_infinite() {
        return if number > 0.0 {
            "Infinity"
        } else {
            "-Infinity"
        }
        .to_owned();
    }
    // Shortest digits that read back the same, as d.ddde[-]x.
    let scientific = format!("{number:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if (-4..16).contains(&exponent) {
        let plain = number.to_string();
        if plain.contains('.') {
            plain
        } else {
            plain + ".0"
        }
    } else {
        let sign = if exponent < 0 { '-' } else { '+' };
        format!("{digits}e{sign}{:02}", exponent.unsigned_abs())
    }
}

/// `datetime.strftime` for a time in UTC, English names. Unknown directives stay as they are.
pub(super) fn strftime(unix_seconds: u64, format: &str) -> String {
    const DAYS: [&str; 7] = [
        "Monday",
        "Tuesday",
        "Wednesday",
        "Thursday",
        "Friday",
        "Saturday",
        "Sunday",
    ];
    const MONTHS: [&str; 12] = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ];
    let date = Civil::of(unix_seconds / 86_400);
    let second_of_day = unix_seconds % 86_400;
    let (hour, minute, second) = (
        second_of_day / 3600,
        second_of_day / 60 % 60,
        second_of_day % 60,
    );
    let hour12 = (hour + 11) % 12 + 1;
    let day_name = DAYS[date.weekday];
    let month_name = MONTHS[date.month - 1];
    let mut out = String::new();
    let mut rest = format.chars();
    while let Some(c) = rest.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let mut directive = rest.next();
        let padded = directive != Some('-');
        if !padded {
            directive = rest.next();
        }
        let number = |out: &mut String, value: u64, width: usize| {
            let width = if padded { width } else { 1 };
            let _ = write!(out, "{value:0width$}");
        };
        match directive {
            Some('Y') => number(&mut out, date.year, 4),
            Some('y') => number(&mut out, date.year % 100, 2),
            Some('m') => number(&mut out, date.month as u64, 2),
            Some('d') => number(&mut out, date.day, 2),
            Some('e') => {
                let _ = write!(out, "{:2}", date.day);
            }
            Some('j') => number(&mut out, date.day_of_year, 3),
            Some('H') => number(&mut out, hour, 2),
            Some('I') => number(&mut out, hour12, 2),
            Some('M') => number(&mut out, minute, 2),
            Some('S') => number(&mut out, second, 2),
            Some('f') => out.push_str("000000"),
            Some('p') => out.push_str(if hour < 12 { "AM" } else { "PM" }),
            Some('A') => out.push_str(day_name),
            Some('a') => out.push_str(&day_name[..3]),
            Some('w') => number(&mut out, (date.weekday as u64 + 1) % 7, 1),
            Some('u') => number(&mut out, date.weekday as u64 + 1, 1),
            Some('B') => out.push_str(month_name),
            Some('b' | 'h') => out.push_str(&month_name[..3]),
            Some('F') => out.push_str(&strftime(unix_seconds, "%Y-%m-%d")),
            Some('D' | 'x') => out.push_str(&strftime(unix_seconds, "%m/%d/%y")),
            Some('T' | 'X') => out.push_str(&strftime(unix_seconds, "%H:%M:%S")),
            Some('R') => out.push_str(&strftime(unix_seconds, "%H:%M")),
            Some('c') => out.push_str(&strftime(unix_seconds, "%a %b %e %H:%M:%S %Y")),
            Some('Z') => out.push_str("UTC"),
            Some('z') => out.push_str("+0000"),
            Some('%') => out.push('%'),
            other => {
                out.push('%');
                if !padded {
                    out.push('-');
                }
                out.extend(other);
            }
        }
    }
    out
}

struct Civil {
    year: u64,
    /// 1 to 12.
    month: usize,
    /// 1 to 31.
    day: u64,
    /// 1 to 366.
    day_of_year: u64,
    /// 0 is Monday.
    weekday: usize,
}

impl Civil {
    /// The Gregorian date `days` after 1 January 1970.
    fn of(days: u64) -> Self {
        let leap = |year: u64| {
            year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400))
        };
        let weekday = usize::try_from((days + 3) % 7).unwrap_or(0);
        // Whole 400-year cycles first, so that the loops below are short for any input.
        let mut year = 1970 + days / 146_097 * 400;
        let mut rest = days % 146_097;
        loop {
            let length = 365 + u64::from(leap(year));
            if rest < length {
                break;
            }
            rest -= length;
            year += 1;
        }
        let day_of_year = rest + 1;
        let mut month = 1;
        for length in [
            31,
            28 + u64::from(leap(year)),
            31,
            30,
            31,
            30,
            31,
            31,
            30,
            31,
            30,
            31,
        ] {
            if rest < length {
                break;
            }
            rest -= length;
            month += 1;
        }
        Self {
            year,
            month,
            day: rest + 1,
            day_of_year,
            weekday,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Expected strings were printed by CPython 3.11.
    #[test]
    fn dates_are_pythons() {
        let format = "%Y-%m-%d %H:%M:%S %a %A %b %B %j %-d %-m %I %p %y %w %u %%";
        for (time, expected) in [
            (
                0,
                "1970-01-01 00:00:00 Thu Thursday Jan January 001 1 1 12 AM 70 4 4 %",
            ),
            (
                951_826_154,
                "2000-02-29 12:09:14 Tue Tuesday Feb February 060 29 2 12 PM 00 2 2 %",
            ),
            (
                1_735_689_599,
                "2024-12-31 23:59:59 Tue Tuesday Dec December 366 31 12 11 PM 24 2 2 %",
            ),
            (
                4_107_542_400,
                "2100-03-01 00:00:00 Mon Monday Mar March 060 1 3 12 AM 00 1 1 %",
            ),
        ] {
            assert_eq!(strftime(time, format), expected);
        }
        assert_eq!(strftime(0, "%Q %-Q 100%"), "%Q %-Q 100%");
    }

    #[test]
    fn floats_are_pythons() {
        for (number, expected) in [
            (1.0, "1.0"),
            (0.1, "0.1"),
            (-2.5, "-2.5"),
            (1e16, "1e+16"),
            (123_456_789_012_345.0, "123456789012345.0"),
            (1.5e-7, "1.5e-07"),
            (0.0001, "0.0001"),
            (1e300, "1e+300"),
        ] {
            assert_eq!(float(number), expected);
        }
    }
}
