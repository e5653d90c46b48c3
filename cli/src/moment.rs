//! Times and durations, as people type and read them.

use std::{str::FromStr, time::Duration};

use chrono::{DateTime, NaiveDate, NaiveDateTime, SecondsFormat, TimeDelta, Utc};

/// A moment from the command line: a time in UTC, or an age.
///
/// `2026-11-21T15:04:05Z`, `2026-11-21 15:04`, `2026-11-21`, `15m` (ago).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Moment(pub DateTime<Utc>);

impl FromStr for Moment {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Ok(time) = DateTime::parse_from_rfc3339(text) {
            return Ok(Self(time.to_utc()));
        }
        for format in ["%Y-%m-%d %H:%M:%S%.f", "%Y-%m-%dT%H:%M:%S%.f", "%Y-%m-%d %H:%M", "%Y-%m-%dT%H:%M"] {
            if let Ok(time) = NaiveDateTime::parse_from_str(text, format) {
                return Ok(Self(time.and_utc()));
            }
        }
        if let Ok(day) = NaiveDate::parse_from_str(text, "%Y-%m-%d") {
            return Ok(Self(day.and_time(chrono::NaiveTime::MIN).and_utc()));
        }
        let ago = text.trim_end_matches("ago").trim_end();
        let span = ago.parse::<Span>().ok().and_then(|span| TimeDelta::from_std(span.0).ok());
        let time = span.and_then(|span| Utc::now().checked_sub_signed(span));
        time.map(Self).ok_or_else(|| {
            "not a time: write 2026-11-21T15:04:05Z, \"2026-11-21 15:04\" (UTC), 2026-11-21, or an age such as 90s, 15m, 2h, 7d"
                .to_owned()
        })
    }
}

/// A duration from the command line: `90s`, `15m`, `2h`, `7d`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Span(pub Duration);

impl FromStr for Span {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || "not a duration: write a number with a unit, such as 500ms, 90s, 15m, 2h, 7d".to_owned();
        let digits = text.find(|c: char| !c.is_ascii_digit()).ok_or_else(wrong)?;
        let number: u64 = text[..digits].parse().map_err(|_| wrong())?;
        let millis = match &text[digits..] {
            "ms" => 1,
            "s" => 1_000,
            "m" => 60_000,
            "h" => 3_600_000,
            "d" => 86_400_000,
            _ => return Err(wrong()),
        };
        Ok(Self(Duration::from_millis(number.saturating_mul(millis))))
    }
}

impl Span {
    /// Returns the moment this long before now.
    pub fn ago(self) -> DateTime<Utc> {
        let delta = TimeDelta::from_std(self.0).unwrap_or(TimeDelta::MAX);
        Utc::now().checked_sub_signed(delta).unwrap_or(DateTime::<Utc>::MIN_UTC)
    }
}

/// Formats a time for people.
pub(crate) fn time(time: DateTime<Utc>) -> String {
    time.to_rfc3339_opts(SecondsFormat::Millis, true)
}

/// Formats the time since a moment for people.
pub(crate) fn age(time: DateTime<Utc>) -> String {
    span(Utc::now() - time)
}

/// Formats a duration for people, in its two largest units.
pub(crate) fn span(delta: TimeDelta) -> String {
    let millis = delta.num_milliseconds();
    let sign = if millis < 0 { "-" } else { "" };
    let millis = millis.unsigned_abs();
    let seconds = millis / 1_000;
    let text = match seconds {
        0 => format!("{millis}ms"),
        1..60 => format!("{seconds}.{}s", millis % 1_000 / 100),
        60..3_600 => format!("{}m {}s", seconds / 60, seconds % 60),
        3_600..86_400 => format!("{}h {}m", seconds / 3_600, seconds % 3_600 / 60),
        _ => format!("{}d {}h", seconds / 86_400, seconds % 86_400 / 3_600),
    };
    format!("{sign}{text}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_parsed_in_common_forms() {
        let expected = "2026-11-21T15:04:00Z".parse::<DateTime<Utc>>().unwrap_or_default();
        for text in ["2026-11-21T15:04:00Z", "2026-11-21 15:04", "2026-11-21T16:04:00+01:00", "2026-11-21 15:04:00.0"] {
            assert_eq!(text.parse(), Ok(Moment(expected)), "{text}");
        }
        let ago = "2h ago".parse::<Moment>().map(|Moment(time)| (Utc::now() - time).num_minutes());
        assert_eq!(ago, Ok(120));
        for text in ["", "yesterday", "5", "15 minutes", "2026-13-01", "-5m"] {
            assert!(text.parse::<Moment>().is_err(), "{text}");
        }
    }

    #[test]
    fn durations_show_two_units() {
        for (millis, text) in
            [(5, "5ms"), (1_250, "1.2s"), (61_000, "1m 1s"), (7_320_000, "2h 2m"), (-90_000, "-1m 30s")]
        {
            assert_eq!(span(TimeDelta::milliseconds(millis)), text);
        }
    }
}
