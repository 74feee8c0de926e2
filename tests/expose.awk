# Makes two headers of one of the library's, line by line, so that tests reach its private functions
# without compiling them again:
#
#   awk -v part=bodies   the implementation, its functions no longer static: makes one object
#   awk -v part=names    the same without function bodies: what the tests include
#
# Types, macros, tables, inline kernels and what macros generate stay as they are, and so do the
# numbers of the lines.  Relies on the header's layout: a function begins in column 0, and its
# braces stand there too or all is on one line.
BEGIN {
    header = ARGV[1]
    sub(/.*\//, "", header)
    print "#line 1 \"" header "\""
    if (part == "names") print "#pragma GCC diagnostic push\n" \
        "#pragma GCC diagnostic ignored \"-Wunused-function\"\n#line 1"
}
{
    code = $0
    gsub(/\/[*].*[*]\//, "", code)
}
/^(static|Q3N_DEF) [A-Za-z0-9_ *]*[(]/ && !/^static inline/ {
    sub(/^static /, "")
    in_head = 1
    if (code ~ /[)] +[{].*[}] *$/) {
        if (part == "names") sub(/ +[{].*[}]/, ";")
        in_head = 0
    }
}
in_head && code ~ /; *$/ { in_head = 0 }
in_head && $0 == "{" {
    in_head = 0
    if (part == "names") {
        print ";"
        in_body = 1
        next
    }
}
in_body {
    if ($0 == "}") in_body = 0
    print ""
    next
}
{ print }
END { if (part == "names") print "#pragma GCC diagnostic pop" }
