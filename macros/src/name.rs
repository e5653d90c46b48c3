//! The stored name of an event type.

const MAX_BYTES: usize = 100;

/// Checks that `name` can be stored, and returns the reason if it cannot.
pub(crate) fn check(name: &str) -> Result<(), String> {
    let allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '.' | '-' | '_');
    if !name.starts_with(|c: char| c.is_ascii_lowercase()) {
        return Err(format!("`{name}` must start with a lowercase letter (a-z)"));
    }
    if let Some(wrong) = name.chars().find(|c| !allowed(*c)) {
        return Err(format!("`{name}` contains {wrong:?}: allowed are a-z, 0-9, `.`, `-` and `_`"));
    }
    if name.len() > MAX_BYTES {
        return Err(format!("`{name}` has {} bytes; the limit is {MAX_BYTES}", name.len()));
    }
    Ok(())
}

/// Converts `OrderPlaced` to `order-placed`. An acronym stays one word: `HTTPCalled` becomes `http-called`.
pub(crate) fn kebab_case(ident: &str) -> String {
    let chars: Vec<char> = ident.chars().collect();
    let mut kebab = String::new();
    for (at, &c) in chars.iter().enumerate() {
        let previous = at.checked_sub(1).map(|before| chars[before]);
        let ends_acronym = chars.get(at + 1).is_some_and(|next| next.is_lowercase());
        let starts_word = c.is_uppercase()
            && previous.is_some_and(|p| p.is_lowercase() || p.is_numeric() || (p.is_uppercase() && ends_acronym));
        if starts_word {
            kebab.push('-');
        }
        match c {
            '_' => kebab.push('-'),
            _ => kebab.extend(c.to_lowercase()),
        }
    }
    kebab
}

#[cfg(test)]
mod tests {
    use super::{check, kebab_case};

    #[test]
    fn variants_become_kebab_case() {
        for (ident, kebab) in [
            ("Placed", "placed"),
            ("OrderPlaced", "order-placed"),
            ("HTTPCalled", "http-called"),
            ("PlacedV2", "placed-v2"),
            ("V2Placed", "v2-placed"),
            ("LegacyID", "legacy-id"),
            ("Order_Placed", "order-placed"),
            ("A", "a"),
        ] {
            assert_eq!(kebab_case(ident), kebab);
        }
    }

    #[test]
    fn names_are_checked() {
        let longest = "a".repeat(100);
        for good in ["a", "order.placed", "order-2_x.y", &longest] {
            assert_eq!(check(good), Ok(()));
        }
        let too_long = "a".repeat(101);
        for bad in ["", "2nd", ".a", "-a", "Order", "order placed", "a/b", "ä", "aä", &too_long] {
            assert!(check(bad).is_err(), "{bad}");
        }
    }
}
