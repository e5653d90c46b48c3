//! Conditional requests (RFC 9110, section 13).

use annals::Version;
use axum::{
    http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};

use crate::{problem::Problem, request::bad};

/// Returns the entity tag of a version.
pub(crate) fn version_tag(version: Version) -> HeaderValue {
    quoted(version.0)
}

/// Returns an entity tag with this text, which needs no escapes.
pub(crate) fn quoted(text: impl std::fmt::Display) -> HeaderValue {
    HeaderValue::from_str(&format!("\"{text}\"")).unwrap_or_else(|_| HeaderValue::from_static("\"\""))
}

/// Returns the answer with its entity tag; if the client already has this entity, returns a 304 instead.
pub(crate) fn with_tag(headers: &HeaderMap, tag: HeaderValue, answer: impl FnOnce() -> Response) -> Response {
    let has = tags(headers, header::IF_NONE_MATCH).any(|known| {
        // A GET compares tags weakly.
        known == "*" || known.trim_start_matches("W/").as_bytes() == tag.as_bytes()
    });
    let mut response = if has { StatusCode::NOT_MODIFIED.into_response() } else { answer() };
    response.headers_mut().insert(header::ETAG, tag);
    response
}

/// Returns the version that a command requires.
///
/// # Errors
/// A 400 if the condition is not a version.
pub(crate) fn expected_version(headers: &HeaderMap) -> Result<Option<Version>, Problem> {
    let mut wanted = tags(headers, header::IF_MATCH);
    let mut unwanted = tags(headers, header::IF_NONE_MATCH);
    let conditions = (wanted.next(), wanted.next(), unwanted.next(), unwanted.next());
    match conditions {
        // A header without a tag, such as that of a client without an `ETag`, is not the absence of a condition.
        (None, _, None, _) if headers.contains_key(header::IF_MATCH) || headers.contains_key(header::IF_NONE_MATCH) => {
            Err(bad("the condition has no entity tag: If-Match takes one version, such as \"3\""))
        }
        (None, _, None, _) => Ok(None),
        (None, _, Some("*"), None) => Ok(Some(Version::START)),
        (Some(tag), None, None, _) => {
            let version = tag.strip_prefix('"').and_then(|tag| tag.strip_suffix('"'));
            let version = version.filter(|tag| tag.starts_with(|c: char| matches!(c, '1'..='9')));
            let version = version.and_then(|tag| tag.parse().ok());
            let version = version.map(Version);
            let wrong = || bad(format!("If-Match: {tag:.40} is not a version in quotes, such as \"3\""));
            version.map(Some).ok_or_else(wrong)
        }
        _ => Err(bad("a command takes one condition: If-Match with one version, or If-None-Match: *")),
    }
}

/// Returns the entity tags of a header.
fn tags(headers: &HeaderMap, name: HeaderName) -> impl Iterator<Item = &str> {
    let values = headers.get_all(name).into_iter().map(|value| value.to_str().unwrap_or("?"));
    values.flat_map(|value| value.split(',')).map(str::trim).filter(|tag| !tag.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(lines: &[(HeaderName, &'static str)]) -> HeaderMap {
        lines.iter().map(|(name, value)| (name.clone(), HeaderValue::from_static(value))).collect()
    }

    #[test]
    fn command_requires_one_version_or_none() {
        let [wanted, unwanted] = [header::IF_MATCH, header::IF_NONE_MATCH];
        for (lines, expected) in [
            (vec![], Some(None)),
            (vec![(wanted.clone(), "\"3\"")], Some(Some(3))),
            (vec![(unwanted.clone(), "*")], Some(Some(0))),
            (vec![(wanted.clone(), "3")], None),
            (vec![(wanted.clone(), "\"0\"")], None),
            (vec![(wanted.clone(), "*")], None),
            (vec![(wanted.clone(), "W/\"3\"")], None),
            (vec![(wanted.clone(), "\"3\", \"4\"")], None),
            (vec![(unwanted.clone(), "\"3\"")], None),
            (vec![(wanted.clone(), "")], None),
            (vec![(wanted.clone(), " , ")], None),
            (vec![(unwanted.clone(), "")], None),
            (vec![(wanted.clone(), "\"+3\"")], None),
            (vec![(wanted.clone(), "\"03\"")], None),
            (vec![(wanted, "\"3\""), (unwanted, "*")], None),
        ] {
            let found = expected_version(&headers(&lines)).ok().map(|version| version.map(|version| version.0));
            assert_eq!(found, expected, "{lines:?}");
        }
    }

    #[test]
    fn client_that_has_the_entity_gets_no_body() {
        for (known, status) in
            [("\"3\"", 304), ("W/\"3\"", 304), ("\"2\", \"3\"", 304), ("*", 304), ("\"2\"", 200), ("3", 200)]
        {
            let response = with_tag(&headers(&[(header::IF_NONE_MATCH, known)]), version_tag(Version(3)), || {
                "the entity".into_response()
            });
            assert_eq!(response.status().as_u16(), status, "{known}");
            assert_eq!(response.headers()[header::ETAG], "\"3\"");
        }
    }
}
