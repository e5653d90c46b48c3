#[derive(annals::Event)]
#[event(prefx = "order")]
enum OnTheEnum {
    Placed,
}

#[derive(annals::Event)]
enum OnAVariant {
    #[event(versoin = 2)]
    Misspelt,
    #[event(prefix = "order")]
    ElsewhereKnown,
    #[event(name = "twice", name = "twice")]
    Twice,
    #[event(name)]
    WithoutValue,
    #[event = "order.placed"]
    WithoutParentheses,
}

#[derive(annals::Event)]
enum OnAField {
    Placed {
        #[event(name = "id")]
        order_id: String,
    },
}

#[derive(annals::Event)]
#[event(unknown = "ignore")]
enum UnknownValue {
    Placed,
}

fn main() {}
