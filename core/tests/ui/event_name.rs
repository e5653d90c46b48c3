#[derive(annals::Event)]
enum OrderEvent {
    #[event(name = "")]
    Empty,
    #[event(name = "Order.Placed")]
    UpperCaseStart,
    #[event(name = "order.Placed")]
    UpperCase,
    #[event(name = "order placed")]
    Space,
    #[event(name = "2nd")]
    DigitFirst,
    #[event(name = "a23456789.a23456789.a23456789.a23456789.a23456789.a23456789.a23456789.a23456789.a23456789.a23456789.a")]
    TooLong,
    Größe,
    _Hidden,
}

#[derive(annals::Event)]
#[event(prefix = "Order")]
enum InvalidPrefix {
    Placed,
}

#[derive(annals::Event)]
#[event(prefix = "order.")]
enum DotAfterPrefix {
    Placed,
}

#[derive(annals::Event)]
#[event(prefix = "a23456789.a23456789.a23456789.a23456789.a23456789.a23456789.a23456789.a23456789.a23456789.abc")]
enum TooLongTogether {
    Placed,
    VeryLong,
}

#[derive(annals::Event)]
#[event(prefix = "order")]
enum HiddenByPrefix {
    _Hidden,
}

fn main() {}
