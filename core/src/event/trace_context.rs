//! The W3C trace context of a request or message: <https://www.w3.org/TR/trace-context/>.

use std::{fmt, sync::Arc};

/// The length of a `traceparent` of version 00, in bytes.
const TRACEPARENT_BYTES: usize = 55;
/// The flags that version 00 defines: `sampled` and `random trace id`.
const KNOWN_FLAGS: u8 = 0b11;
/// The maximum number of members of a `tracestate`, as set by the W3C recommendation.
const TRACESTATE_MEMBERS_MAX: usize = 32;
/// The maximum length in bytes of a `tracestate` that is propagated. The W3C recommendation demands at least this
/// length. The maximum is not greater, because each event stores the `tracestate`.
pub const TRACESTATE_BYTES_MAX: usize = 512;
/// If a `tracestate` is too long, members longer than this number of bytes are dropped first, as the W3C recommendation
/// demands.
const LARGE_MEMBER_BYTES: usize = 128;

/// A valid `traceparent` and the `tracestate` that belongs to it.
///
/// ```
/// use annals::TraceContext;
/// let parent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
/// let trace = TraceContext::parse([parent], ["vendor=1", "other=2"]).expect("valid");
/// assert_eq!((trace.traceparent(), trace.tracestate()), (parent, Some("vendor=1,other=2")));
/// // A request must have one `traceparent`.
/// assert_eq!(TraceContext::parse([parent, parent], []), None);
/// ```
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct TraceContext(
    /// The `traceparent`, directly followed by the `tracestate`. The length of the `traceparent` is always
    /// [`TRACEPARENT_BYTES`]. The `tracestate` may be empty.
    Arc<str>,
);

impl TraceContext {
    /// Parses the values of all `traceparent` and all `tracestate` headers. Returns `None` unless there is exactly one
    /// `traceparent` and it is valid. An invalid `tracestate` is left out.
    ///
    /// If the `traceparent` has a later version, only the four fields that version 00 defines are used, and the result
    /// has version 00.
    pub fn parse<'h>(
        traceparents: impl IntoIterator<Item = &'h str>,
        tracestates: impl IntoIterator<Item = &'h str>,
    ) -> Option<Self> {
        let mut traceparents = traceparents.into_iter();
        let traceparent = traceparents.next()?;
        if traceparents.next().is_some() {
            return None;
        }
        let flags = flags(traceparent)?;
        let mut states = tracestates.into_iter().peekable();
        if traceparent.starts_with("00") && states.peek().is_none() {
            return Some(Self(traceparent.into()));
        }
        let mut text = format!("00-{}-{flags:02x}", &traceparent[3..TRACEPARENT_BYTES - 3]);
        if let Some(members) = members(states) {
            text += &members.join(",");
        }
        Some(Self(text.into()))
    }

    /// The `traceparent`, always in version 00.
    pub fn traceparent(&self) -> &str {
        &self.0[..TRACEPARENT_BYTES]
    }

    /// The `tracestate`, if there is one: its members, joined by commas.
    pub fn tracestate(&self) -> Option<&str> {
        Some(&self.0[TRACEPARENT_BYTES..]).filter(|state| !state.is_empty())
    }
}

impl fmt::Debug for TraceContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut fields = f.debug_struct("TraceContext");
        fields.field("traceparent", &self.traceparent()).field("tracestate", &self.tracestate()).finish()
    }
}

/// Returns the flags to propagate, if the string is a valid `traceparent`.
fn flags(text: &str) -> Option<u8> {
    let bytes = text.as_bytes();
    if bytes.len() < TRACEPARENT_BYTES || !text.is_char_boundary(TRACEPARENT_BYTES) {
        return None;
    }
    let hex = |part: &str| part.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte));
    let mut fields = text[..TRACEPARENT_BYTES].split('-');
    let mut field = |digits: usize| fields.next().filter(|field| field.len() == digits && hex(field));
    let version = field(2)?;
    let trace_id = field(32)?;
    let parent_id = field(16)?;
    let flags = u8::from_str_radix(field(2)?, 16).ok()?;
    let is_zero = |id: &str| id.bytes().all(|byte| byte == b'0');
    let is_whole = match version {
        "00" => bytes.len() == TRACEPARENT_BYTES,
        "ff" => false,
        _ => bytes.get(TRACEPARENT_BYTES).is_none_or(|byte| *byte == b'-'),
    };
    let is_valid = is_whole && !is_zero(trace_id) && !is_zero(parent_id);
    // This code does not know the meaning of other flags in later versions, so it clears these flags.
    is_valid.then_some(if version == "00" { flags } else { flags & KNOWN_FLAGS })
}

/// Returns the members of all `tracestate` headers in order, with at most [`TRACESTATE_BYTES_MAX`] bytes; `None` if a
/// member is invalid.
fn members<'h>(headers: impl Iterator<Item = &'h str>) -> Option<Vec<&'h str>> {
    let mut members = Vec::new();
    let mut bytes = 0;
    for member in headers.flat_map(|header| header.split(',')) {
        let member = member.trim_matches([' ', '\t']);
        if member.is_empty() {
            continue;
        }
        let (key, value) = member.split_once('=')?;
        if members.len() == TRACESTATE_MEMBERS_MAX || !is_key(key) || !is_value(value) {
            return None;
        }
        bytes += member.len() + 1;
        members.push(member);
    }
    let mut excess = bytes.saturating_sub(TRACESTATE_BYTES_MAX + 1);
    let mut leave_out = |member: &str| {
        let leaves = excess > 0;
        if leaves {
            excess = excess.saturating_sub(member.len() + 1);
        }
        leaves
    };
    members.retain(|member| member.len() <= LARGE_MEMBER_BYTES || !leave_out(member));
    while members.last().is_some_and(|member| leave_out(member)) {
        members.pop();
    }
    Some(members)
}

/// Returns whether the string is a valid key: `vendor`, or `tenant@vendor`.
fn is_key(key: &str) -> bool {
    let lower = |byte: Option<&u8>| byte.is_some_and(u8::is_ascii_lowercase);
    let plain = |part: &[u8]| {
        part.iter().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"_-*/".contains(byte))
    };
    match key.split_once('@') {
        None => key.len() <= 256 && lower(key.as_bytes().first()) && plain(key.as_bytes()),
        Some((tenant, vendor)) => {
            let tenant = tenant.as_bytes();
            let vendor = vendor.as_bytes();
            let starts = lower(tenant.first()) || tenant.first().is_some_and(u8::is_ascii_digit);
            starts
                && tenant.len() <= 241
                && plain(tenant)
                && vendor.len() <= 14
                && lower(vendor.first())
                && plain(vendor)
        }
    }
}

/// Returns whether the string is a valid value: printable ASCII without `,` and `=`. A value cannot end with a space,
/// because members are trimmed.
fn is_value(value: &str) -> bool {
    (1..=256).contains(&value.len()) && value.bytes().all(|byte| (b' '..=b'~').contains(&byte) && byte != b'=')
}

#[cfg(test)]
mod tests {
    use super::*;

    const TRACE: &str = "12345678901234567890123456789012";
    const PARENT: &str = "1234567890123456";

    fn parent(text: &str) -> Option<String> {
        TraceContext::parse([text], []).map(|trace| trace.traceparent().to_owned())
    }

    fn state(headers: &[&str]) -> Option<String> {
        let traceparent = format!("00-{TRACE}-{PARENT}-01");
        let trace = TraceContext::parse([&*traceparent], headers.iter().copied()).expect("a valid traceparent");
        assert_eq!(trace.traceparent(), traceparent);
        trace.tracestate().map(str::to_owned)
    }

    #[test]
    fn traceparent_follows_the_recommendation() {
        for flags in ["00", "01", "02", "ff"] {
            let text = format!("00-{TRACE}-{PARENT}-{flags}");
            assert_eq!(parent(&text), Some(text));
        }
        let invalid = [
            String::new(),
            "00".into(),
            format!("00-{}-{PARENT}-01", "0".repeat(32)),
            format!("00-{TRACE}-{}-01", "0".repeat(16)),
            format!("ff-{TRACE}-{PARENT}-01"),
            format!("00-{TRACE}-{PARENT}-01-what"),
            format!("00-{TRACE}-{PARENT}-01-"),
            format!("00-{TRACE}-{PARENT}-011"),
            format!("00-{TRACE}-{PARENT}-0"),
            format!("00-{TRACE}-{PARENT}"),
            format!("00-{TRACE}-{PARENT}-.0"),
            format!("00-{TRACE}-{PARENT}-0A"),
            format!("0A-{TRACE}-{PARENT}-01"),
            format!("0-{TRACE}0-{PARENT}-01"),
            format!("00_{TRACE}-{PARENT}-01"),
            format!("00-{}-{PARENT}-01", "ABCDEF78901234567890123456789012"),
            format!("00-{TRACE}-{}-01", "123456789012345X"),
            format!("cc-{TRACE}-{PARENT}-01.what"),
            format!("cc-{TRACE}-{PARENT}-01é"),
            format!("cc-{TRACE}-{PARENT}-0é"),
            format!(" 00-{TRACE}-{PARENT}-01"),
            "nul\0".into(),
        ];
        for text in invalid {
            assert_eq!(parent(&text), None, "{text}");
        }
    }

    #[test]
    fn traceparent_of_a_later_version_is_read_by_its_first_four_fields() {
        let known = |flags: &str| Some(format!("00-{TRACE}-{PARENT}-{flags}"));
        assert_eq!(parent(&format!("cc-{TRACE}-{PARENT}-01")), known("01"));
        assert_eq!(parent(&format!("cc-{TRACE}-{PARENT}-01-what-the-future-will-be-like")), known("01"));
        assert_eq!(parent(&format!("01-{TRACE}-{PARENT}-ff-")), known("03"));
        assert_eq!(parent(&format!("cc-{}-{PARENT}-01-more", "0".repeat(32))), None);
    }

    #[test]
    fn missing_or_repeated_traceparent_is_ignored() {
        let text = format!("00-{TRACE}-{PARENT}-01");
        assert_eq!(TraceContext::parse([&*text, &*text], ["a=1"]), None);
        assert_eq!(TraceContext::parse([], ["a=1"]), None);
        assert_eq!(TraceContext::parse(["none"], ["a=1"]), None);
    }

    #[test]
    fn tracestate_follows_the_recommendation() {
        let text = |text: &str| Some(text.to_owned());
        assert_eq!(state(&["foo=1"]), text("foo=1"));
        assert_eq!(state(&["foo=1,bar=2", "rojo=1", "", "congo=2"]), text("foo=1,bar=2,rojo=1,congo=2"));
        assert_eq!(state(&["foo=1 \t , \t bar=2, ,baz= a b"]), text("foo=1,bar=2,baz= a b"));
        assert_eq!(state(&["0tenant@vendor=1,a-b_c*d/e=\"x\"\\"]), text("0tenant@vendor=1,a-b_c*d/e=\"x\"\\"));
        assert_eq!(state(&["", " , "]), None);
        for wrong in [
            "foo",
            "=1",
            "foo=",
            "FOO=1",
            "foo =1",
            "foo.bar=1",
            "0foo=1",
            "foo@=1",
            "@foo=1",
            "foo@@bar=1",
            "foo@0=1",
            "foo=bar=baz",
            "foo=é",
            "foo=a\tb",
            "foo=\0",
        ] {
            assert_eq!(state(&["a=1", wrong]), None, "{wrong}");
        }
        let key = |bytes: usize| format!("{}=1", "z".repeat(bytes));
        assert_eq!(state(&[&key(256)]), Some(key(256)));
        assert_eq!(state(&[&key(257)]), None);
        let tenant = |tenant: usize, vendor: usize| format!("{}@{}=1", "t".repeat(tenant), "v".repeat(vendor));
        assert_eq!(state(&[&tenant(241, 14)]), Some(tenant(241, 14)));
        assert_eq!(state(&[&tenant(242, 1)]), None);
        assert_eq!(state(&[&tenant(1, 15)]), None);
        let value = |bytes: usize| format!("a={}", "v".repeat(bytes));
        assert_eq!(state(&[&value(256)]), Some(value(256)));
        assert_eq!(state(&[&value(257)]), None);
        let many = |count: usize| (0..count).map(|n| format!("k{n}=1")).collect::<Vec<_>>().join(",");
        assert_eq!(state(&[&many(32)]), Some(many(32)));
        assert_eq!(state(&[&many(33)]), None);
    }

    #[test]
    fn long_tracestate_loses_large_members_then_the_last() {
        let member = |name: char, bytes: usize| format!("{name}={}", "x".repeat(bytes - 2));
        let exact = [member('a', 255), member('b', 256)].join(",");
        assert_eq!((exact.len(), state(&[&exact])), (TRACESTATE_BYTES_MAX, Some(exact.clone())));
        let long = [member('a', 200), member('b', 128), member('c', 128), member('d', 100)];
        assert_eq!(state(&[&long.join(",")]), Some(long[1..].join(",")));
        let small: Vec<_> = ('a'..='f').map(|name| member(name, 100)).collect();
        assert_eq!(state(&[&small.join(",")]), Some(small[..5].join(",")));
    }
}
