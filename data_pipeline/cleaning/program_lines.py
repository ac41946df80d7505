"""Patterns of the lines of programs, commands and logs.

A line that matches `CODE` is code, unless it is prose. A line that matches `PERHAPS_CODE` is code if it stands next to a line
of code.
"""

import re


def ascii_only(pattern: str) -> str:
    """Limit `\\w`, `\\d`, `\\s` and `\\b` to ASCII, for which the regular expressions of polars are far faster."""
    classes = {"w": "0-9A-Za-z_", "d": "0-9", "s": r"\x20\t"}
    pieces, in_class = [], False
    for token in re.findall(r"\\.|.", pattern, flags=re.DOTALL):
        if token[0] == "\\" and token[1] in classes:
            pieces.append(classes[token[1]] if in_class else f"[{classes[token[1]]}]")
        elif token == r"\b":
            pieces.append(r"(?-u:\b)")
        elif in_class and token in " #":  # which would be left out and begin a comment, in contrast to Python
            pieces.append(rf"\x{ord(token):02x}")
        else:
            in_class = token == "[" or (in_class and token != "]")
            pieces.append(token)
    return "".join(pieces)


_TYPE = (
    r"(?:int|char|float|double|void|bool|boolean|long|short|byte|size_t|ssize_t|FILE|String|string|auto|var|let|const|val"
    r"|u?int\d+(?:_t)?|unsigned|signed|struct\s+\w+|enum\s+\w+|std::[\w:<>, ]+|vector<[\w:<>, ]+>|(?:Array)?List<[\w<>, ]+>"
    r"|Map<[\w<>, ]+>)"
)
_MODIFIER = (
    r"(?:public|private|protected|static|final|abstract|const|extern|inline|virtual|volatile|export|async|pub|mut"
    r"|default)"
)
_COMMAND = (
    r"(?:git\s+(?:clone|add|commit|push|pull|checkout|remote|init|log|diff|rebase|merge|status|fetch|config)\b"
    r"|(?:curl|wget)\s+(?:-|\"?'?https?:)|pip3?\s+install\s|conda\s+\w+\s+-|npm\s+(?:install|run|i)\b|npx\s|yarn\s+add\s"
    r"|docker\s+(?:run|pull|build|compose|exec)\b|kubectl\s|apt(?:-get)?\s+\w+\s|brew\s+install\s|python3?\s+-?[\w./]+|cargo\s+\w+"
    r"|go\s+(?:get|run|build|install)\s|ls\s+-|cd\s+[/~.]|chmod\s+[+\d]|mkdir\s+-p|rm\s+-|cp\s+-|grep\s+-|find\s+[/.~]\S*\s+-"
    r"|awk\s+'|sed\s+-|tar\s+-?[xzc]|ssh\s+\S+@|scp\s|make\s+\w+$|export\s+\w+=|echo\s+[\"'$]|cat\s+[/<]|systemctl\s+\w+)"
)
_SURE = (
    rf"(?:{_MODIFIER}\s+)*{_TYPE}\b[\w\s<>*&\[\],:.]*\s[*&]*\s*[*&]?\w+(?:\[[^\]]*\])*\s*(?:=[^=].*|\(.*"
    rf"|,.*)?[;{{]\s*(?://.*|/\*.*)?$",
    rf"(?:{_MODIFIER}\s+)+[\w<>\[\],. ?]+[({{=;].*$",
    r"(?:async\s+)?def\s+\w+\s*\(.*$",
    r"def\s+[\w.]+[?!]?\s*$",
    r"class\s+\w+\s*(?:\(.*\))?\s*(?::|\{)\s*$",
    r"class\s+\w+\s+(?:extends|implements)\s+\w+.*$",
    r"(?:interface|trait|impl|enum|struct|union|object|module)\s+[\w<>]+.*\{\s*$",
    r"(?:function|func|fn|sub|proc|fun)\s+[\w.:]*\s*(?:<.*>)?\(.*$",
    r"(?:if|for|while|switch|catch|elseif)\s*\(.*\)\s*\{?\s*$",
    r"(?:if|elif|while|with|except)\s+.*[\w)\]\"']\s*(?:==|!=|<=|>=|\bin\b|\bis\b|\bnot\b|\bas\b"
    r"|\().*:\s*(?:#.*)?$",
    r"for\s+[\w, ()]+\s+in\s+[\w.\[\]]+(?:\(.*\))?\s*:.*$",
    r"for\s+\w+\s+in\s+.*[;{]?\s*do$",
    r"(?:if|while)\s+\[\[?\s.*\]\]?\s*;?.*$",
    r"from\s+[\w.]+\s+import\s.*$",
    r"import\s+[\w.]+(?:\s+as\s+\w+|\.\w+;|\.\*;|;)?\s*$",
    r"import\s+[\w{}*, ]+\s+from\s+[\"'].*$",
    r"(?:package|namespace|using)\s+[\w.:]+\s*[;{]?$",
    r"use\s+[\w:]+(?:::[\w{}, *]+)+;$",
    r"require\s*\(?[\"'].*$",
    r'#\s*(?:include\s*[<"]|define\s+\w|if(?:n?def)?\s+\w|endif\b|pragma\s|!/).*$',
    r"<\?php.*$",
    r"<!(?:DOCTYPE|--).*$",
    r"(?:const|let|var)\s+[\w{}\[\], ]+\s*=.*$",
    r".*\)\s*=>\s*[{(\w].*$",
    r".*\bfunction\s*\w*\s*\(.*\)\s*\{.*$",
    r"(?:await\s+|return\s+|new\s+)?[\w$]+(?:(?:\.|->|::)[\w$]+)*!?\s?\(.*\)\s*;?\s*(?://.*|#.*)?$",
    r"(?:await\s+|return\s+)?[\w$]+(?:(?:\.|->|::)[\w$]+)+\(.*$",
    r"(?:fetch|require|printf|print|println)\(.*$",
    r"(?:return|throw|delete|goto|break|continue)\b[^.]*;\s*$",
    r"return\s+[\w.]+(?:\(.*\)|\[.*\])\s*$",
    r"[\w$*.\[\]>\"'-]+(?:\s*\[[^\]]*\])*\s*(?:[-+*/%|&^.]|<<|>>)?=\s*[^=].*;\s*(?://.*|%.*)?$",
    r"[\w.]+\s*<-\s*\S.*$",
    r"[\w.\[\]\"']+(?:\s*,\s*[\w.]+)*\s*(?:[-+*/]|//"
    r"|\*\*)?=\s*(?:await\s+)?[A-Za-z_][\w.]*\(.*\)[\w.()\[\]]*\s*(?:#.*)?$",
    r"[\w$]+\s*:?=\s*(?:[\"'\[{].*|None|True|False|null|nil|new\s.*|lambda\b.*|\[.*)$",
    r"[\w$]+\s*:=\s*\S.*$",
    r"(?:SELECT\s.*\sFROM\s|SELECT\s+(?:\*|[\w.]+(?:\s*,|$))|INSERT\s+INTO\s|CREATE\s+(?:OR\s|TABLE|INDEX"
    r"|VIEW|DATABASE|FUNCTION)|UPDATE\s+\w+\s+SET\b|DELETE\s+FROM\s|DROP\s+TABLE\s|ALTER\s+TABLE\s|(?:LEFT"
    r"|INNER|RIGHT)?\s*JOIN\s\w+\s.*\bON\b|GROUP\s+BY\s|ORDER\s+BY\s|WITH\s\w+\sAS\s\().*$",
    r">>>\s?.*$",
    r"In\s\[\d+\]:.*$",
    r"(?:\$|#|%|PS\s\S+>|[\w.-]+@[\w.-]+:\S*\$|C:\\\S*>)\s+(?:sudo\s+)?(?:[a-z][\w./-]*)(?:\s.*)?$",
    rf"(?:sudo\s+)?{_COMMAND}.*$",
    r"\[?\d{4}[-/]\d\d[-/]\d\d[T ]\d\d:\d\d.*$",
    r"\[?\d\d:\d\d:\d\d(?:[.,]\d+)?\]?\s+\S.*$",
    r"\d{1,3}(?:\.\d{1,3}){3}\s-\s.*$",
    r"[A-Z][a-z]{2}\s[\s\d]\d\s\d\d:\d\d:\d\d\s.*$",
    r"Traceback\s\(most.*$",
    r'File\s".*",\sline\s\d+.*$',
    r"at\s[\w.$<>]+\(.*\)$",
    r"(?:\[\s*)?(?:INFO|WARN|WARNING|ERROR|DEBUG|FATAL|TRACE)(?:\s*\])?[:\s]\s*\S.*$",
    r"diff\s--git\s.*$",
    r"index\s[0-9a-f]{6,}\.\..*$",
    r"@@\s-\d.*$",
    r"(?:---|\+\+\+)\s[\w/].*$",
    r"(?:GET|POST|PUT|PATCH|DELETE|HEAD)\s/\S*\sHTTP/.*$",
    r'"[^"]+"\s*:\s*(?:["\[{\d]|true|false|null).*$',
    r"[{\[]\s*[\"'{\[].*[}\]][;,]?\s*$",
    r'[{\[]\s*"[^"]*"\s*:.*$',
    r"[.#]?[\w-]+(?:[\s,>.#:\w()*-]*)\{(?:[^\\]*\})?\s*$",
    r"[\w-]+:\s[^;:]*;\s*$",
    r"@\w[\w.]*(?:\(.*\))?\s*$",
    r"\((?:def\w*|let|lambda|setq|defun|ns|require)\s.*$",
    r"\w+\s+::\s+.*->.*$",
    r".*\s\|>?\s(?:grep|awk|sed|sort|head|wc|xargs|tee)\b.*$",
    r"\\(?:documentclass|usepackage|newcommand|section|subsection|item|label|caption|includegraphics"
    r"|bibliography|maketitle|url|href)\b.*$",
    r"FROM\s\S+(?::\S+)?(?:\sAS\s\w+)?$",
    r"(?:RUN|COPY|ENTRYPOINT|CMD|WORKDIR|EXPOSE)\s\S.*$",
    r"\.[A-Z]+\w*\s*=.*$",
)
CODE = ascii_only(r"^\s*(?:" + "|".join(_SURE) + ")")
# Closing brackets, keywords, comments, assignments, calls, and lines that end like a statement.
PERHAPS_CODE = re.compile(
    r"\s*(?:[})\];,{(\[]+[\s})\];,]*$|\}\s*(?:else|catch|finally|while)\b.*"
    r"|(?:else|try|finally|do|begin|end|then|fi|done|esac|pass|break)\s*[:;{]?\s*$"
    r"|(?:if|for|while|elif|else if|switch|case|match|when|unless|until|with|except|return|yield|raise|assert|del|print|puts"
    r"|echo|end|default)\b.*|\w+(?:\s+[\w()]+){1,3}\s*=\s*\S|//|/\*|\*/|\* |#|--\s|%|;;|'{3}|\"{3}|<[A-Za-z/!?]"
    r"|[-+] ?\S.*[;:(){}\[\]=]|[\w.$\[\]'\"()*&>-]+\s*(?:[-+*/|&]|:)?=\s*\S|[\w.$]+\(.*\)|[\w-]+:(?:\s|$)|- |\.\w|@\w|\w+,$"
    r"|[A-Z]+\s+[\w.,*\s=<>'()]+;?$|\w+\s+\w+\(|.*[;{}\\]\s*$|\d+\s|\[[\w. \"-]+\]$|[+-](?![-+ ]).*)"
)
