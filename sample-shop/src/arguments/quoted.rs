//! What an error may quote of what was typed.

/// The text, or only its scheme where the rest may hold a password: in front of an `@`, among parameters, behind a second colon.
pub(super) fn quoted(text: &str) -> String {
    let (scheme, rest) = text.split_once("://").unwrap_or(("", text));
    let is_port =
        |after: &str| after.split(['/', ',']).next().is_some_and(|port| port.bytes().all(|b| b.is_ascii_digit()));
    let has_secret = text.contains(['@', '?', '#'])
        || text.to_ascii_lowercase().contains("password")
        || (!scheme.is_empty() && rest.split(':').skip(1).any(|after| !is_port(after)));
    match scheme {
        _ if !has_secret => text.to_owned(),
        _ if is_scheme(scheme) => format!("{scheme}://…"),
        _ => "…".to_owned(),
    }
}

/// Whether this can be a scheme at all, and not what stands in front of the colon of something else, such as a user's name.
pub(super) fn is_scheme(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_alphabetic())
        && text.chars().all(|c| c.is_ascii_alphanumeric() || ['+', '-', '.'].contains(&c))
}
