use rust_decimal::Decimal;

/// Formats a number with a comma every three digits: `368,150`, `-1,709`.
pub fn grouped(number: impl Into<i128>) -> String {
    let number: i128 = number.into();
    let digits = number.unsigned_abs().to_string();
    let mut text = String::from(if number < 0 { "-" } else { "" });
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// Formats an amount with two decimals. Fractions of a penny are kept, because a rounded sum would be wrong.
pub(super) fn money(amount: Decimal) -> String {
    let exact = amount.normalize();
    let decimals = exact.scale().max(2) as usize;
    format!("{exact:.decimals$}")
}

/// Formats an amount as [`money`] does, with a comma every three digits.
pub(super) fn grouped_money(amount: Decimal) -> String {
    let text = money(amount);
    let (whole, decimals) = text.split_once('.').unwrap_or((&text, "00"));
    let sign = if whole.starts_with('-') { "-" } else { "" };
    let whole: i128 = whole.trim_start_matches('-').parse().unwrap_or_default();
    format!("{sign}{}.{decimals}", grouped(whole))
}

/// Formats a number with a comma every three digits and the given number of decimals.
pub(super) fn grouped_decimal(number: f64, decimals: usize) -> String {
    let text = format!("{number:.decimals$}");
    let (whole, fraction) = text.split_once('.').unwrap_or((&text, ""));
    match whole.parse::<i128>() {
        Ok(whole) => format!("{}.{fraction}", grouped(whole)),
        Err(_) => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_digits() {
        for (number, text) in
            [(0, "0"), (999, "999"), (1_000, "1,000"), (368_150, "368,150"), (-1_709, "-1,709"), (-999, "-999")]
        {
            assert_eq!(grouped(number), text);
        }
        assert_eq!(grouped(u64::MAX), "18,446,744,073,709,551,615");
    }

    #[test]
    fn decimals_stay() {
        for (number, text) in [(0.0, "0.00"), (1.006, "1.01"), (999.999, "1,000.00"), (1_234_567.8, "1,234,567.80")] {
            assert_eq!(grouped_decimal(number, 2), text);
        }
        assert_eq!(grouped_decimal(f64::INFINITY, 2), "inf");
    }

    #[test]
    fn money_is_exact() {
        for (mantissa, scale, plain, with_commas) in [
            (83_977_222, 2, "839772.22", "839,772.22"),
            (0, 0, "0.00", "0.00"),
            (5, 1, "0.50", "0.50"),
            (-5, 1, "-0.50", "-0.50"),
            (1_000, 0, "1000.00", "1,000.00"),
            (12_500, 4, "1.25", "1.25"),
            (12_345, 4, "1.2345", "1.2345"),
        ] {
            let amount = Decimal::new(mantissa, scale);
            assert_eq!((money(amount).as_str(), grouped_money(amount).as_str()), (plain, with_commas));
        }
    }
}
