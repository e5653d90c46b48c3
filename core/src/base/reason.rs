//! Conversion of failure reasons to a form that every store accepts. The length of a reason is limited.

/// The maximum length of a stored reason in characters. The length is limited because people read the reason, and
/// because the events of a saga repeat the reason several times.
pub(crate) const REASON_CHARS_MAX: usize = 4_000;

/// Replaces every control character except tabs and newlines, and cuts the text at [`REASON_CHARS_MAX`].
pub(crate) fn storable(reason: &str) -> String {
    let unprintable = |character: char| character.is_control() && !matches!(character, '\n' | '\t');
    let printable = |character| if unprintable(character) { char::REPLACEMENT_CHARACTER } else { character };
    let whole = reason.chars().count();
    if whole <= REASON_CHARS_MAX {
        return reason.chars().map(printable).collect();
    }
    let mark = format!("… ({whole} characters)");
    let kept = reason.chars().take(REASON_CHARS_MAX - mark.chars().count());
    kept.map(printable).chain(mark.chars()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reason_is_cleaned_and_shortened() {
        assert_eq!(storable("no\0pe\u{1b}[1m\tand\nso on é"), "no\u{fffd}pe\u{fffd}[1m\tand\nso on é");
        let long = storable(&"é".repeat(1_000_000));
        assert_eq!(long.chars().count(), REASON_CHARS_MAX);
        assert!(long.ends_with("é… (1000000 characters)"), "{}", long.len());
        assert_eq!(storable(&long), long, "a text that was cut is not cut again");
    }
}
