"""How the service stands, for an operator at a terminal: `figures` asks both servers, `text` shows it."""
