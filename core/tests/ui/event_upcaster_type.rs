use serde_json::Value;

fn infallible(old: Value) -> Value {
    old
}

fn from_text(old: String) -> Result<Value, String> {
    Ok(old.into())
}

#[derive(annals::Event)]
enum OrderEvent {
    #[event(version = 3, upcasters(infallible, from_text))]
    Placed,
    #[event(version = 2, upcasters(missing))]
    Closed,
}

fn main() {}
